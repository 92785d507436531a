"""How good a picture is, how surely we know it, and what judges it: FID, KID, Inception Score, CLIP score, accuracies.

Thin over torchmetrics: every score takes features, probabilities or embeddings, so that the same function serves the
small scorer of the world `portraits` (:class:`ScorerNet`) and Inception-v3 with CLIP ViT-g/14 of the real worlds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

PAD, UNKNOWN = "<pad>", "<unk>"


def words(text: str) -> list[str]:
    """Return the lower-case words and punctuation marks of `text`; hyphens and apostrophes stay inside a word."""
    return re.findall(r"[a-z0-9]+(?:[-'’][a-z0-9]+)*|[^\sa-z0-9]", text.lower())


class ScorerNet(nn.Module):
    """Small image tower, text tower and linear classifiers that judge 64 x 64 pictures, one for all scores.

    `config` keys: ``heads`` (name -> list of values, one linear classifier each), ``vocabulary`` (list of words), and,
    with defaults, ``widths`` [32, 64, 96, 128] (one stage of stride 2 each), ``dim`` 128 (features and embeddings),
    ``layers`` 2, ``attention_heads`` 4, ``max_words`` 48. Pictures are (N, 3, H, W) in [0, 1].
    """

    DEFAULTS: Mapping = {"widths": [32, 64, 96, 128], "dim": 128, "layers": 2, "attention_heads": 4, "max_words": 48}

    def __init__(self, config: Mapping) -> None:
        super().__init__()
        for key in ("heads", "vocabulary"):
            if not config.get(key):
                raise ValueError(f"scorer config has no {key!r}: give a non-empty one")
        self.config = {**self.DEFAULTS, **config}
        dim, widths = self.config["dim"], self.config["widths"]
        self.values = {name: tuple(values) for name, values in self.config["heads"].items()}
        known = [PAD, UNKNOWN, *(w for w in self.config["vocabulary"] if w not in (PAD, UNKNOWN))]
        self.index = {word: i for i, word in enumerate(known)}

        def stage(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(),
            )  # fmt: skip

        self.tower = nn.Sequential(*(stage(a, b) for a, b in zip([3, *widths], widths, strict=False)))
        self.to_features = nn.Linear(widths[-1], dim)
        self.classifiers = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in self.values.items()})
        self.token = nn.Embedding(len(known), dim, padding_idx=0)
        self.position = nn.Parameter(torch.randn(self.config["max_words"], dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, self.config["attention_heads"], 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, self.config["layers"], enable_nested_tensor=False)
        self.image_projection = nn.Linear(dim, dim, bias=False)
        self.text_projection = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.659))  # ln(1 / 0.07), as CLIP starts

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, dim) of pictures (N, 3, H, W) in [0, 1]; H and W at least 16."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures of shape {tuple(images.shape)}: expected (N, 3, H, W) with values in [0, 1]")
        return self.to_features(self.tower(images * 2 - 1).mean(dim=(2, 3)))

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Return, for each head, logits (N, number of values) from features (N, dim)."""
        return {name: head(functional.silu(features)) for name, head in self.classifiers.items()}

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Return, for each head, logits (N, number of values) from pictures (N, 3, H, W) in [0, 1]."""
        return self.classify(self.features(images))

    def embed_image(self, images: Tensor) -> Tensor:
        """Return unit-length embeddings (N, dim) of pictures (N, 3, H, W) in [0, 1]."""
        return functional.normalize(self.image_projection(self.features(images)), dim=-1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return word numbers (N, longest text), 0 where a text has ended, 1 for a word outside the vocabulary."""
        rows = [[self.index.get(w, 1) for w in words(t)][: self.config["max_words"]] or [1] for t in texts]
        longest = max(map(len, rows), default=1)
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.position.device)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit-length embeddings (N, dim) of texts."""
        tokens = self.tokens(texts)
        there = tokens != 0
        hidden = self.encoder(self.token(tokens) + self.position[: tokens.shape[1]], src_key_padding_mask=~there)
        pooled = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return functional.normalize(self.text_projection(pooled), dim=-1)

    def forward(self, images: Tensor, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return (logits by head, image embeddings, text embeddings) with one pass through each tower, for training.

        The contrastive logits (N, N) are ``logit_scale.exp() * image @ text.T``.
        """
        features = self.features(images)
        image = functional.normalize(self.image_projection(features), dim=-1)
        return self.classify(features), image, self.embed_text(texts)

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16) into `folder`, which is made where missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        half = {name: value.detach().half().contiguous() for name, value in self.state_dict().items()}
        save_file(half, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> ScorerNet:
        """Return the frozen fp32 net saved in `folder`, in eval mode; ValueError where a file is missing or misfits."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"no scorer in {folder}: {name} is missing; give the folder that ScorerNet.save wrote")
        net = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        try:
            net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        except RuntimeError as error:
            raise ValueError(f"weights in {folder} do not fit its config.json: {error}") from error
        return net.eval().requires_grad_(False)
