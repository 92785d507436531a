"""How good a picture is, how surely we know it, and what judges it: FID, KID, Inception Score, CLIP score, accuracies.

Thin over torchmetrics: every score takes features, probabilities or embeddings, so that the same function serves the
small scorer of the world `portraits` (:class:`ScorerNet`) and Inception-v3 with CLIP ViT-g/14 of the real worlds.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import beta
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_kernel

PAD, UNKNOWN = "<pad>", "<unk>"
SENSITIVE = ("age", "gender", "ethnicity")  # heads that count as attributes; every other head is context
BLOCK = 2000  # pictures a kernel matrix may span; beyond it KID is the mean over disjoint blocks


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

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (N, C, h, w) after each stage, fine to coarse."""
        found, x = [], images * 2 - 1
        for stage in self.tower:
            x = stage(x)
            found.append(x)
        return found

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


class RealNet(nn.Module):
    """Inception-v3 and a CLIP model behind the methods of :class:`ScorerNet`, for worlds of real checkpoints.

    `inception` is called as ``inception(uint8 pictures, return_features=True)`` -> (N, 2048) and
    ``inception(uint8 pictures, no_output_bias=True)`` -> class probabilities; see :func:`load_inception`.
    `zero_shot` gives, for each head, value -> sentence: the heads are CLIP's zero-shot logits, not trained classifiers.
    """

    def __init__(
        self, inception: nn.Module, clip: nn.Module, tokenizer: Callable, preprocessor: Mapping, zero_shot: Mapping
    ) -> None:
        super().__init__()
        self.inception, self.clip, self.tokenizer = inception, clip, tokenizer
        self.zero_shot = {name: dict(sentences) for name, sentences in zero_shot.items()}
        self.values = {name: tuple(sentences) for name, sentences in self.zero_shot.items()}
        self.size = clip.config.vision_config.image_size
        for name, usual in (("image_mean", (0.4815, 0.4578, 0.4082)), ("image_std", (0.2686, 0.2613, 0.2758))):
            self.register_buffer(name, torch.tensor(preprocessor.get(name, usual)).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Return Inception-v3 pool features (N, 2048) of pictures (N, 3, H, W) in [0, 1]."""
        return self.inception(_bytes(images), return_features=True).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """Return Inception-v3 class probabilities (N, 1008), without the output bias, as the Inception Score uses."""
        return self.inception(_bytes(images), no_output_bias=True).float()

    def embed_image(self, images: Tensor) -> Tensor:
        """Return unit-length CLIP embeddings: short side resized bicubically, centre crop, normalised."""
        scale = self.size / min(images.shape[-2:])
        size = [max(self.size, round(side * scale)) for side in images.shape[-2:]]
        x = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        x = x[..., top : top + self.size, left : left + self.size]
        return _unit(self.clip.get_image_features(pixel_values=(x - self.image_mean) / self.image_std))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit-length CLIP embeddings of texts, cut at the model's length."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        tokens = {name: value.to(self.image_mean.device) for name, value in tokens.items()}
        return _unit(self.clip.get_text_features(**tokens))

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Return zero-shot logits, by head: the scaled cosine with each value's sentence."""
        image, scale = self.embed_image(images), self.clip.logit_scale.exp()
        return {name: scale * image @ self.embed_text(s.values()).T for name, s in self.zero_shot.items()}


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _unit(found) -> Tensor:
    return functional.normalize(getattr(found, "pooler_output", found).float(), dim=-1)


def load_inception(path: str | Path) -> nn.Module:
    """Return the FID's Inception-v3 from a TorchScript file or from torch-fidelity's weights; ValueError otherwise.

    ``.pt`` is the TorchScript translation of the original graph that StyleGAN's and clean-FID's authors publish
    (``inception-2015-12-05.pt``): nothing but torch is needed. ``.pth`` is the state dict of torch-fidelity
    (``weights-inception-2015-12-05-6726825d.pth``), which needs that package.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no Inception-v3 at {path}: give the downloaded inception-2015-12-05.pt (TorchScript)")
    if path.suffix == ".pth":
        return _FidelityInception(path)
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: expected inception-2015-12-05.pt ({error})") from error


class _FidelityInception(nn.Module):
    """torch-fidelity's Inception-v3 behind the calls of the TorchScript file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            do = "pip install -e '.[inception]', or use the .pt file"
            raise ValueError(f"{path} needs torch-fidelity: {do}") from error
        layers = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=str(path))

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features, logits = self.net(images)
        return features if return_features else logits.softmax(dim=1)


def load_real(
    inception: str | Path,
    clip: str | Path,
    zero_shot: Mapping[str, Mapping[str, str]] | None = None,
    *,
    local_files_only: bool = False,
    torch_device: str = "cpu",
) -> Scorer:
    """Return the scorer of real worlds: `inception` a file for :func:`load_inception`, `clip` a hub id or a folder.

    The paper's CLIP score uses ViT-g/14 (``laion/CLIP-ViT-g-14-laion2B-s12B-b42K``). `zero_shot` defaults to one
    sentence a value of the three attributes. ValueError where a model cannot be reached.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.image_processing_utils import ImageProcessingMixin

    options = {"local_files_only": local_files_only}
    try:
        model = CLIPModel.from_pretrained(str(clip), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(clip), **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no CLIP model at {str(clip)!r}: neither a folder in the transformers layout nor an id that the model hub "
            f"served; download it beforehand and give the folder ({str(error).splitlines()[0]})"
        ) from error
    try:
        preprocessor, _ = ImageProcessingMixin.get_image_processor_dict(str(clip), **options)
    except OSError:
        preprocessor = {}  # a folder without preprocessor_config.json: CLIP's usual mean and spread
    if zero_shot is None:
        from obclip_core.prompts import ATTRIBUTES

        zero_shot = {name: {v: f"a photo of a {v} person" for v in values} for name, values in ATTRIBUTES.items()}
    net = RealNet(load_inception(inception), model, tokenizer, preprocessor, zero_shot)
    return Scorer(net.to(torch_device).eval().requires_grad_(False), name=f"inception-v3 + {clip}")


@dataclass(frozen=True)
class Scorer:
    """What judges pictures: a :class:`ScorerNet` or :class:`RealNet`, called in batches, without gradients.

    All methods take pictures (N, 3, H, W) in [0, 1] on any device and return tensors on the CPU.
    """

    net: nn.Module
    name: str = "portraits"
    batch: int = 64

    def __post_init__(self) -> None:
        for method in ("features", "heads", "embed_image", "embed_text"):
            if not hasattr(self.net, method):
                raise ValueError(f"{type(self.net).__name__} has no method {method}: expected a ScorerNet or a RealNet")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: expected at least 1 picture")

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """Return, for each head, its values in the order of the probabilities."""
        return self.net.values

    @torch.no_grad()
    def _all(self, function: Callable, items: Tensor | Sequence) -> Tensor | dict[str, Tensor]:
        device = next(self.net.parameters()).device
        found = []
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            found.append(function(part.to(device, torch.float32) if isinstance(part, Tensor) else part))
        if not found:
            raise ValueError("no pictures to score: expected at least one")
        if isinstance(found[0], dict):
            return {name: torch.cat([f[name] for f in found]).float().cpu() for name in found[0]}
        return torch.cat(found).float().cpu()

    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D), the input of FID and KID."""
        return self._all(self.net.features, images)

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Return, for every head, probabilities (N, number of values)."""
        return {name: logits.softmax(-1) for name, logits in self._all(self.net.heads, images).items()}

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """Return probabilities (N, number of values) of age, gender and ethnicity."""
        return {name: p for name, p in self.heads(images).items() if name in SENSITIVE}

    def context(self, images: Tensor) -> dict[str, Tensor]:
        """Return probabilities (N, number of values) of every other head: garment, colour, accessory, mood, place."""
        return {name: p for name, p in self.heads(images).items() if name not in SENSITIVE}

    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (N, classes) for the Inception Score.

        Inception-v3's classes where the net has them; else the 30 combinations of age, gender and ethnicity, as the
        product of the three classifiers.
        """
        if hasattr(self.net, "probabilities"):
            return self._all(self.net.probabilities, images)
        joint = torch.ones(len(images), 1)
        for p in self.attributes(images).values():
            joint = (joint[:, :, None] * p[:, None, :]).flatten(1)
        return joint

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return cosines (N,) of each picture with its own text, the raw CLIP score."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} pictures but {len(texts)} texts: expected one text a picture")
        return (self._all(self.net.embed_image, images) * self._all(self.net.embed_text, list(texts))).sum(-1)

    def correct(self, images: Tensor, truth: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
        """Return :func:`correct` of all heads."""
        return correct(self.heads(images), self.values, truth)

    def judge(self, images: Tensor, texts: Sequence[str], truth: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
        """Return all that tables ask of pictures with a text and values each, as arrays.

        clip_score, attribute_accuracy, context_accuracy (N,), nan where nothing asked has a classifier; features (N, D)
        and probabilities (N, classes).
        """
        right = self.correct(images, truth)
        context = set(right) - set(SENSITIVE)
        return {
            "clip_score": clip_scores(self.similarity(images, texts)),
            "attribute_accuracy": attribute_accuracy(right),
            "context_accuracy": context_accuracy(right) if context else np.full(len(images), np.nan),
            "features": self.features(images).numpy(),
            "probabilities": self.probabilities(images).numpy(),
        }


def scorer(world) -> Scorer:
    """Return the scorer of a world: of its ``scorer`` entry, or of a folder given directly.

    The entry is a folder that :meth:`ScorerNet.save` wrote; for real worlds a folder with
    ``inception-2015-12-05.pt`` and a CLIP model in ``clip/``, or a table {"inception": file, "clip": id or folder}.
    """
    entry = getattr(world, "scorer", world)
    if isinstance(entry, Scorer):
        return entry
    if isinstance(entry, Mapping):
        return load_real(**entry)
    if not entry:
        raise ValueError(
            f"world {getattr(world, 'name', world)!r} names no scorer: give a folder, or inception and clip"
        )
    if (Path(entry) / "clip").is_dir():
        return load_real(Path(entry) / "inception-2015-12-05.pt", Path(entry) / "clip", local_files_only=True)
    return Scorer(ScorerNet.load(entry), name=str(getattr(world, "name", Path(entry).name)))


# Scores of sets of pictures


class _Identity(nn.Module):
    """Stands in for torchmetrics' feature extractor: what comes in are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _features(features, name: str = "features", least: int = 2) -> Tensor:
    found = torch.as_tensor(features).detach().cpu().double()
    if found.ndim != 2 or len(found) < least:
        raise ValueError(f"{name} of shape {tuple(found.shape)}: expected (N, D) with N at least {least}")
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} are not all finite: look at the pictures they come from")
    return found


def _both(a, b) -> tuple[Tensor, Tensor]:
    a, b = _features(a), _features(b, "reference features")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} numbers, the reference {b.shape[1]}: use one scorer for both")
    return a, b


def fid(features, reference) -> float:
    """Return the Frechet distance of two sets of features (N, D) and (M, D), each fitted by a Gaussian.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). Biased upwards by about c / N: see :func:`fid_infinity`.
    """
    features, reference = _both(features, reference)
    metric = FrechetInceptionDistance(_Identity(features.shape[1]))
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return float(metric.compute())


@dataclass(frozen=True)
class Extrapolation:
    """FID for infinitely many pictures (`value`), and what it comes from: FID `measured` at `n`, `slope` over 1 / n."""

    value: float
    slope: float
    measured: float
    n: int


def fid_infinity(features, reference, seed: int = 0, points: int = 8, repeats: int = 3) -> Extrapolation:
    """Return FID extrapolated to infinite N by a line over 1 / N (Chong and Forsyth, 2020).

    Both sets are subsampled by the same fractions f from 1/2 to 1, so that the line over 1 / f takes off both biases.
    """
    features, reference = _both(features, reference)
    n, m = len(features), len(reference)
    if min(n, m) < 8:
        raise ValueError(f"{n} pictures and {m} references: expected at least 8 each to extrapolate FID")
    rng = np.random.default_rng(seed)
    x, y = [1.0], [fid(features, reference)]
    for f in np.linspace(0.5, 1.0, points)[:-1]:
        for _ in range(repeats):
            i = rng.permutation(n)[: max(4, round(f * n))]
            j = rng.permutation(m)[: max(4, round(f * m))]
            x.append(n / len(i))
            y.append(fid(features[i], reference[j]))
    slope, value = np.polyfit(x, y, 1)
    return Extrapolation(float(value), float(slope * n), y[0], n)


def fid_note(n: int, dim: int) -> str:
    """Return the label that belongs beside an FID of `n` pictures and `dim` features; empty where N is large enough."""
    if n >= 20 * dim:
        return ""
    rank = ", covariance not even of full rank" if n <= dim else ""
    return f"n = {n} for {dim} features: biased upwards{rank}; compare by KID"


def _pair_sums(weights: Tensor, kernel: Tensor, groups: Tensor) -> Tensor:
    """Return, for each row of weights (B, N), the weighted mean of kernel over pairs of different groups."""
    other = (groups[:, None] != groups[None, :]).double()
    return ((weights @ (kernel * other)) * weights).sum(1) / ((weights @ other) * weights).sum(1).clamp_min(1e-30)


def _groups(groups, n: int) -> Tensor:
    if groups is None:
        return torch.arange(n)
    found = torch.as_tensor(np.unique(np.asarray(groups), return_inverse=True)[1]).flatten()
    if len(found) != n:
        raise ValueError(f"{len(found)} prompts for {n} pictures: expected the prompt's number of each picture")
    return found


def _mmd(features: Tensor, reference: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Return unbiased MMD^2 (B,) under the cubic kernel, for each row of picture weights (B, N)."""
    own = _pair_sums(weights, poly_kernel(features, features), groups)
    cross = poly_kernel(features, reference).mean(1)
    one = torch.ones(1, len(reference), dtype=torch.float64)
    theirs = _pair_sums(one, poly_kernel(reference, reference), torch.arange(len(reference)))
    return own - 2 * (weights @ cross) / weights.sum(1) + theirs


def _block_kid(features: Tensor, reference: Tensor, groups: Tensor, seed: int) -> Tensor:
    """Return the KID of each of the fewest disjoint blocks of at most BLOCK pictures on either side."""
    blocks = -(-max(len(features), len(reference)) // BLOCK)
    rng = np.random.default_rng(seed)
    at, of = rng.permutation(int(groups.max()) + 1), rng.permutation(len(reference))
    parts = zip(np.array_split(at, blocks), np.array_split(of, blocks), strict=True)
    found = []
    for part, ref in parts:
        i = torch.isin(groups, torch.as_tensor(part)).nonzero().flatten()
        found.append(_mmd(features[i], reference[ref], groups[i], torch.ones(1, len(i), dtype=torch.float64)))
    return torch.cat(found)


def kid(features, reference, groups=None, seed: int = 0) -> float:
    """Return KID: unbiased MMD^2 under the kernel (x.y / D + 1)^3 over all pairs; 0 in expectation for equal sources.

    `groups`, the prompt's number of each picture, leaves out pairs that share a prompt. Beyond 2,000 pictures it is
    the mean over disjoint blocks, shuffled by `seed`.
    """
    features, reference = _both(features, reference)
    return float(_block_kid(features, reference, _groups(groups, len(features)), seed).mean())


def inception_score(probabilities, splits: int = 1, seed: int = 0) -> float:
    """Return exp(mean KL(p(y|x) || p(y))) of class probabilities (N, C), the mean over `splits` parts; from 1 to C."""
    p = _probabilities(probabilities)
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits is {splits}: expected 1 to {len(p)}, the number of pictures")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns of its memory, and of the spread of a single split
        torch.manual_seed(seed)
        metric = InceptionScore(_Identity(p.shape[1]), splits=splits)
        metric.update(p.clamp_min(1e-30).log())
        return float(metric.compute()[0])


def _probabilities(probabilities) -> Tensor:
    p = _features(probabilities, "probabilities", 1)
    if (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("probabilities have a row that is negative or does not sum to 1: expected softmax outputs")
    return p / p.sum(1, keepdim=True)


# Scores of each picture: arrays (N,), to be averaged and bootstrapped


def clip_scores(cosines, clamped: bool = False) -> np.ndarray:
    """Return the CLIP score of each picture: the raw cosine in [-1, 1], or max(100 cos, 0) as it is usually clamped."""
    found = np.asarray(cosines, dtype=float)
    if np.abs(found).max(initial=0) > 1 + 1e-4:
        raise ValueError(f"cosine {found[np.abs(found).argmax()]:.3f}: expected values in [-1, 1]")
    return np.maximum(100 * found, 0.0) if clamped else found


def correct(
    probabilities: Mapping[str, Tensor], values: Mapping[str, Sequence[str]], truth: Sequence[Mapping[str, str]]
) -> dict[str, np.ndarray]:
    """Return, by head, 1.0 where the likeliest value is the caption's, 0.0 where not, nan where the caption names none.

    `probabilities` (N, values) by head, `values` their names in order, `truth` one mapping head -> value a picture.
    """
    found = {}
    for name, p in probabilities.items():
        if len(p) != len(truth):
            raise ValueError(f"{len(p)} pictures but {len(truth)} captions: expected one caption a picture")
        index = {value: i for i, value in enumerate(values[name])}
        for told in truth:
            if name in told and told[name] not in index:
                raise ValueError(f"{name} {told[name]!r} is unknown to the scorer: expected one of {', '.join(index)}")
        wanted = np.array([index.get(told.get(name), -1) for told in truth])
        right = (p.argmax(-1).numpy() == wanted).astype(float)
        found[name] = np.where(wanted < 0, np.nan, right)
    return found


def _mean_of(right: Mapping[str, np.ndarray], names: Sequence[str], what: str) -> np.ndarray:
    if not names:
        raise ValueError(f"no {what} among {', '.join(right)}: nothing to average")
    stack = np.stack([right[name] for name in names])
    told = ~np.isnan(stack)
    total = np.where(told, stack, 0.0).sum(0)
    return np.divide(total, told.sum(0), out=np.full(stack.shape[1], np.nan), where=told.any(0))


def attribute_accuracy(right: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return, for each picture, the share of its told attributes (age, gender, ethnicity) that are right, or nan."""
    return _mean_of(right, [name for name in SENSITIVE if name in right], "attribute")


def context_accuracy(right: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return, for each picture, the share of its told context words that are right, or nan."""
    return _mean_of(right, [name for name in right if name not in SENSITIVE], "context head")


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"pictures {tuple(a.shape)} against {tuple(b.shape)}: expected two equal (N, 3, H, W)")


def ssim(images: Tensor, others: Tensor) -> np.ndarray:
    """Return the structural similarity (N,) of picture pairs in [0, 1]; 1 for equal ones."""
    _same(images, others)
    found = structural_similarity_index_measure(images.double(), others.double(), data_range=1.0, reduction="none")
    return found.reshape(-1).cpu().numpy()


def perceptual_distance(scorer: Scorer, images: Tensor, others: Tensor) -> np.ndarray:
    """Return the distance (N,) of picture pairs in scorer features, as LPIPS without learned weights; 0 for equal ones.

    At each stage the maps are scaled to unit length over channels; the squared difference is summed over channels and
    averaged over places, then over stages. A net without maps is compared by its pooled features, scaled likewise.
    """
    _same(images, others)
    net = scorer.net

    def stages(part: Tensor) -> list[Tensor]:
        return net.maps(part) if hasattr(net, "maps") else [net.features(part)[:, :, None, None]]

    def distance(pair: Tensor) -> Tensor:
        pairs = zip(stages(pair[:, 0]), stages(pair[:, 1]), strict=True)
        apart = [(functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).square().sum(1) for a, b in pairs]
        return torch.stack([d.mean(dim=(1, 2)) for d in apart]).mean(0)

    return scorer._all(distance, torch.stack([images, others], dim=1)).numpy()


def diversity(features) -> np.ndarray:
    """Return, for each picture, its mean distance to all others in unit-length features; the mean is the diversity."""
    unit = functional.normalize(_features(features), dim=1)
    return (torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").sum(1) / (len(unit) - 1)).numpy()


# How sure we are


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its confidence interval (95 % unless told) and the number of prompts behind it."""

    value: float
    low: float
    high: float
    n: int

    def row(self, name: str = "") -> dict[str, float]:
        """Value and bounds as a table's columns: value, low, high, or those of a metric: name, name_low, name_high."""
        keys = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
        return dict(zip(keys, (self.value, self.low, self.high), strict=True))


def _resample(prompts: int, seed: int, resamples: int) -> np.ndarray:
    """Return how often each prompt is drawn (resamples, prompts)."""
    if prompts < 2:
        raise ValueError(f"{prompts} prompts: expected at least 2 for an interval")
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(float)


def _ends(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ci(values, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Return the mean of `values` and its percentile bootstrap interval over prompts.

    `values` is (P,), one value a prompt, or (P, S), several seeds a prompt: whole rows are drawn. nan is left out.
    Where every value is equal the interval has no width: for shares near 0 or 1 use :func:`proportion_ci`.
    """
    rows = np.asarray(values, dtype=float)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ValueError(f"values of shape {rows.shape}: expected (prompts,) or (prompts, seeds)")
    told = ~np.isnan(rows)
    rows, told = rows[told.any(1)], told[told.any(1)]
    counts = _resample(len(rows), seed, resamples)
    total, number = np.where(told, rows, 0.0).sum(1), told.sum(1)
    draws = (counts @ total) / (counts @ number)
    return Interval(float(total.sum() / number.sum()), *_ends(draws, level), len(rows))


def paired_difference_ci(a, b, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Return mean(a - b) and its interval, for two methods that share prompts and noise row by row."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape}: paired values need the same prompts and seeds in both")
    return bootstrap_ci(a - b, seed, resamples, level)


def proportion_ci(right, level: float = 0.95) -> Interval:
    """Return the share of ones among 0/1 values (nan left out) and its exact Clopper-Pearson interval."""
    values = np.asarray(right, dtype=float).ravel()
    values = values[~np.isnan(values)]
    if not len(values) or not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("expected at least one value, each 0 or 1 (or nan)")
    n, k, tail = len(values), int(values.sum()), (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Interval(k / n, low, high, n)


def kid_ci(features, reference, groups=None, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Interval:
    """Return KID and its bootstrap interval over prompts, the reference held fixed; `groups` as for :func:`kid`."""
    return _kid_interval([features], reference, groups, seed, resamples, level)


def kid_difference_ci(
    a, b, reference, groups=None, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Return KID(a) - KID(b) and its interval, the same prompts drawn for both; rows of a and b belong together."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"features {np.shape(a)} and {np.shape(b)}: paired sets need the same pictures in both")
    return _kid_interval([a, b], reference, groups, seed, resamples, level)


def _kid_interval(sets, reference, groups, seed, resamples, level) -> Interval:
    sets, reference = [_both(f, reference)[0] for f in sets], _both(sets[0], reference)[1]
    groups = _groups(groups, len(sets[0]))
    prompts = int(groups.max()) + 1
    if max(len(sets[0]), len(reference)) > BLOCK:
        found = [_block_kid(f, reference, groups, seed).numpy() for f in sets]
        blocks = found[0] if len(sets) == 1 else found[0] - found[1]
        quantile = float(student.ppf((1 + level) / 2, len(blocks) - 1))
        value, half = float(blocks.mean()), quantile * float(blocks.std(ddof=1)) / len(blocks) ** 0.5
        return Interval(value, value - half, value + half, prompts)
    counts = np.vstack([np.ones(prompts), _resample(prompts, seed, resamples)])
    weights = torch.as_tensor(counts)[:, groups]
    found = [_mmd(f, reference, groups, weights).numpy() for f in sets]
    draws = found[0] if len(sets) == 1 else found[0] - found[1]
    return Interval(float(draws[0]), *_ends(draws[1:], level), prompts)


def inception_score_ci(
    probabilities, groups=None, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Return the Inception Score (one split) and its basic bootstrap interval over prompts.

    The score is biased at small N; the basic interval, 2 value - quantile, moves against that bias.
    """
    p = _probabilities(probabilities).numpy()
    at = _groups(groups, len(p)).numpy()
    weights = np.vstack([np.ones(at.max() + 1), _resample(int(at.max()) + 1, seed, resamples)])[:, at]
    weights /= weights.sum(1, keepdims=True)
    own = weights @ np.where(p > 0, p * np.log(np.clip(p, 1e-300, None)), 0.0).sum(1)
    mean = weights @ p
    draws = np.exp(own - np.where(mean > 0, mean * np.log(np.clip(mean, 1e-300, None)), 0.0).sum(1))
    low, high = _ends(draws[1:], level)
    return Interval(float(draws[0]), float(2 * draws[0] - high), float(2 * draws[0] - low), int(at.max()) + 1)


# Fairness


def groups(values, labels: Sequence) -> dict[object, np.ndarray]:
    """Return the `values` (N,) of each label that two values or more have, nan left out."""
    values, labels = np.asarray(values, dtype=float), np.asarray(labels)
    if values.shape != labels.shape:
        raise ValueError(f"{values.shape} values and {labels.shape} labels: expected one label a value")
    own = {g: values[(labels == g) & ~np.isnan(values)] for g in dict.fromkeys(labels.tolist())}
    return {g: few for g, few in own.items() if len(few) > 1}


def by_group(values, labels: Sequence, seed: int = 0) -> dict[object, Interval]:
    """Return mean and interval of `values` (N,) for each label that two values or more have, e.g. by ethnicity."""
    return {g: bootstrap_ci(own, seed) for g, own in groups(values, labels).items()}


def gap_ci(values, labels: Sequence, level: float = 0.95) -> Interval:
    """Return the largest difference between group means, and an interval that covers the largest true one.

    The pair is picked after looking, so the bounds come from intervals of all pairs that hold at once (Bonferroni),
    each Welch's with the degrees of freedom of the smallest group. 0/1 values get one of each in every group first, as
    Agresti and Caffo do: groups in which all are right still leave a doubt. ValueError for fewer than two groups.
    """
    found = list(groups(values, labels).values())
    if len(found) < 2:
        raise ValueError(f"{len(found)} groups with two values or more: expected at least 2 for a gap")
    means, n = np.array([own.mean() for own in found]), np.array([len(own) for own in found])
    if np.isin(np.concatenate(found), (0.0, 1.0)).all():
        centres, most = (means * n + 1) / (n + 2), 1.0
        variances = centres * (1 - centres) / (n + 2)
    else:
        centres, most = means, np.inf
        variances = np.array([own.var(ddof=1) for own in found]) / n
    apart = np.abs(centres[:, None] - centres)
    pairs = len(found) * (len(found) - 1) / 2
    half = student.ppf(1 - (1 - level) / 2 / pairs, n.min() - 1) * np.sqrt(variances[:, None] + variances)
    np.fill_diagonal(half, 0.0)
    low, high = max(0.0, (apart - half).max()), min(most, (apart + half).max())
    return Interval(float(np.ptp(means)), float(low), float(high), int(n.sum()))


def attribute_distance(values: Mapping[str, str], pivot: Mapping[str, str]) -> int:
    """Return in how many attributes a candidate differs from the pivot."""
    if set(values) != set(pivot):
        raise ValueError(f"candidate names {sorted(values)}, pivot {sorted(pivot)}: expected the same attributes")
    return sum(values[name] != pivot[name] for name in values)
