"""Scores against closed forms, a second implementation, and what must not pass silently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from obclip_core import metrics

HEADS = {
    "age": ["young", "middle-aged", "old"],
    "gender": ["male", "female"],
    "ethnicity": ["caucasian", "african", "asian", "indian", "european"],
    "place": ["by the sea", "in a city"],
    "mood": ["smiling", "serious"],
}
VOCABULARY = ["a", "smiling", "old", "middle-aged", "woman", "man", "sea"]


@pytest.fixture(scope="module")
def net() -> metrics.ScorerNet:
    torch.manual_seed(3)
    return metrics.ScorerNet({"heads": HEADS, "vocabulary": VOCABULARY, "widths": [8, 16], "dim": 16}).eval()


@pytest.fixture(scope="module")
def scorer(net) -> metrics.Scorer:
    return metrics.Scorer(net, batch=3)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# The scorer


def test_words_split_at_punctuation_and_keep_hyphens():
    assert metrics.words("A Middle-aged man's hat, red.") == ["a", "middle-aged", "man's", "hat", ",", "red", "."]


def test_default_net_is_small_and_has_128_features():
    net = metrics.ScorerNet({"heads": HEADS, "vocabulary": VOCABULARY}).eval()
    assert net.features(torch.rand(2, 3, 64, 64)).shape == (2, 128)
    assert sum(p.numel() for p in net.parameters()) < 1_500_000


def test_saved_scorer_loads_to_the_same_answers_in_half_precision(net, images, tmp_path):
    net.save(tmp_path)
    again = metrics.ScorerNet.load(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * sum(p.numel() for p in net.parameters()) + 8000
    assert torch.allclose(again.features(images), net.features(images), atol=5e-3)
    assert torch.allclose(again.embed_text(["a smiling woman"]), net.embed_text(["a smiling woman"]), atol=5e-3)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.values["age"] == ("young", "middle-aged", "old")


def test_missing_or_foreign_scorer_folder_is_named(net, tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        metrics.ScorerNet.load(tmp_path)
    net.save(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"a",', "")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.ScorerNet.load(tmp_path)
    with pytest.raises(ValueError, match="no 'heads'"):
        metrics.ScorerNet({"vocabulary": ["a"]})


def test_text_embedding_is_unit_ignores_padding_and_sees_word_order(net):
    alone, padded = net.embed_text(["old man"]), net.embed_text(["old man", "a smiling old woman a smiling old woman"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert torch.allclose(padded.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(net.embed_text(["old man"]), net.embed_text(["man old"]), atol=1e-4)
    assert torch.equal(net.tokens(["zebra man"]), torch.tensor([[1, net.index["man"]]]))


def test_training_pass_gives_what_the_single_calls_give(net, images):
    logits, image, text = net(images, ["a man"] * 7)
    assert torch.allclose(image, net.embed_image(images), atol=1e-6)
    assert torch.allclose(text, net.embed_text(["a man"] * 7), atol=1e-6)
    assert all(torch.allclose(logits[name], value, atol=1e-6) for name, value in net.heads(images).items())


def test_scorer_batches_change_nothing_and_probabilities_sum_to_one(net, scorer, images):
    assert torch.allclose(scorer.features(images), net.features(images).detach(), atol=1e-5)
    assert set(scorer.attributes(images)) == {"age", "gender", "ethnicity"}
    assert set(scorer.context(images)) == {"place", "mood"}
    joint = scorer.probabilities(images)
    assert joint.shape == (7, 30) and torch.allclose(joint.sum(1), torch.ones(7), atol=1e-5)
    p = scorer.attributes(images)
    assert math.isclose(
        float(joint[2, 1 * 10 + 1 * 5 + 4]),
        float(p["age"][2, 1] * p["gender"][2, 1] * p["ethnicity"][2, 4]),
        rel_tol=1e-4,
    )
    cosine = scorer.similarity(images, ["a man"] * 7)
    assert torch.allclose(cosine, (net.embed_image(images) * net.embed_text(["a man"])).sum(-1), atol=1e-5)
    with pytest.raises(ValueError, match="one text a picture"):
        scorer.similarity(images, ["a man"])


def test_the_judge_answers_what_single_questions_answer(net, scorer, images):
    texts = ["a smiling old man"] * 7
    truth = [{"age": age, "gender": "male", "mood": "smiling"} for age in ("old", "young") * 3 + ("old",)]
    told, right = scorer.judge(images, texts, truth), scorer.correct(images, truth)
    assert np.array_equal(told["attribute_accuracy"], (right["age"] + right["gender"]) / 2)
    assert np.array_equal(told["context_accuracy"], right["mood"])
    assert np.allclose(told["clip_score"], scorer.similarity(images, texts), atol=1e-6)
    assert np.array_equal(told["features"], scorer.features(images).numpy())
    assert told["probabilities"].shape == (7, 30)
    bare = metrics.ScorerNet(net.config | {"heads": {name: HEADS[name] for name in metrics.SENSITIVE}})
    nothing = metrics.Scorer(bare.eval()).judge(images, texts, truth)["context_accuracy"]
    assert np.isnan(nothing).all() and len(nothing) == 7


def test_scorer_of_a_world_a_folder_or_nothing(net, tmp_path):
    net.save(tmp_path)
    world = type("World", (), {"name": "tiny", "scorer": tmp_path})()
    assert metrics.scorer(world).name == "tiny"
    assert metrics.scorer(tmp_path).values == net.values
    with pytest.raises(ValueError, match="names no scorer"):
        metrics.scorer(type("World", (), {"name": "tiny", "scorer": None})())
    with pytest.raises(ValueError, match="no method features"):
        metrics.Scorer(nn.Linear(2, 2))


# FID


def gaussian(n: int, mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """Return n points whose sample mean and covariance are exactly `mean` and root @ root.T."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(linalg.sqrtm(np.cov(x, rowvar=False)).real)
    return x @ root.T + mean


def test_fid_of_two_gaussians_is_the_closed_form():
    spread = np.diag([1.0, 2.0, 3.0])
    a, b = gaussian(50, np.zeros(3), np.eye(3), 0), gaussian(60, np.array([1.0, -2.0, 0.5]), spread, 1)
    closed = (
        1 + 4 + 0.25 + sum((1 - s) ** 2 for s in (1.0, 2.0, 3.0))
    )  # |m|^2 + sum (s - s')^2 for commuting covariances
    assert math.isclose(metrics.fid(a, b), closed, rel_tol=1e-9)
    assert abs(metrics.fid(a, a)) < 1e-9


def test_fid_equals_the_matrix_square_root_of_scipy():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((80, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((90, 6)) + 1
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert math.isclose(metrics.fid(a, b), expected, rel_tol=1e-6)


def test_fid_infinity_takes_off_most_of_the_bias_at_small_n():
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found.append(metrics.fid_infinity(rng.standard_normal((160, 12)), rng.standard_normal((160, 12)), seed))
    measured, extrapolated = np.mean([f.measured for f in found]), np.mean([f.value for f in found])
    assert measured > 0.3  # the truth is 0
    assert abs(extrapolated) < measured / 3
    assert all(f.slope > 0 and f.n == 160 for f in found)


def test_fid_is_labelled_where_n_is_small():
    assert metrics.fid_note(30_000, 1000) == ""
    assert "biased" in metrics.fid_note(300, 128) and "rank" not in metrics.fid_note(300, 128)
    assert "rank" in metrics.fid_note(100, 128)


@pytest.mark.parametrize("call", [metrics.fid, metrics.kid, metrics.fid_infinity])
def test_features_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="one scorer"):
        call(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        call(np.zeros((1, 3)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match="finite"):
        call(np.full((9, 3), np.nan), np.zeros((9, 3)))


# KID


def test_kid_equals_torchmetrics_and_a_double_loop():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 5)), rng.standard_normal((40, 5)) * 1.5 + 0.3
    with pytest.warns(UserWarning, match="memory"):
        other = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=40)
    other.update(torch.as_tensor(b), real=True)
    other.update(torch.as_tensor(a), real=False)
    assert math.isclose(metrics.kid(a, b), float(other.compute()[0]), rel_tol=1e-9)

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    c = b[:30]  # unequal sizes
    own = np.mean([k(a[i], a[j]) for i in range(40) for j in range(40) if i != j])
    theirs = np.mean([k(c[i], c[j]) for i in range(30) for j in range(30) if i != j])
    cross = np.mean([k(x, y) for x in a for y in c])
    assert math.isclose(metrics.kid(a, c), own + theirs - 2 * cross, rel_tol=1e-9)


def test_kid_is_zero_in_expectation_for_equal_sources_and_fid_is_not():
    rng = np.random.default_rng(2)
    kids, fids = [], []
    for _ in range(30):
        a, b = rng.standard_normal((30, 8)), rng.standard_normal((30, 8))
        kids.append(metrics.kid(a, b))
        fids.append(metrics.fid(a, b))
    assert abs(np.mean(kids)) < 3 * stats.sem(kids)
    assert np.mean(fids) > 20 * stats.sem(fids)


def test_kid_over_blocks_agrees_with_all_pairs(monkeypatch):
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((400, 4)) + 0.5, rng.standard_normal((300, 4))
    whole = metrics.kid(a, b)
    monkeypatch.setattr(metrics, "BLOCK", 100)
    blocks = metrics.kid_ci(a, b)
    assert blocks.low < whole < blocks.high
    assert math.isclose(metrics.kid(a, b), blocks.value, rel_tol=1e-12)


def test_pairs_of_one_prompt_do_not_count():
    rng = np.random.default_rng(6)
    prompts = rng.standard_normal((25, 4))
    a = np.repeat(prompts, 8, axis=0) + 0.01 * rng.standard_normal((200, 4))  # eight near copies a prompt
    b = rng.standard_normal((400, 4))
    assert metrics.kid(a, b, np.repeat(np.arange(25), 8)) < metrics.kid(a, b) - 0.05
    with pytest.raises(ValueError, match="prompt's number"):
        metrics.kid(a, b, np.arange(3))


def test_kid_interval_covers_zero_for_equal_sources_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(40):
        reference = rng.standard_normal((200, 4))
        i = metrics.kid_ci(rng.standard_normal((60, 4)), reference, seed=seed, resamples=100)
        covered += i.low <= 0 <= i.high
    assert 33 <= covered


def test_paired_kid_difference_is_sure_where_single_intervals_are_not():
    rng = np.random.default_rng(8)
    reference, a = rng.standard_normal((200, 6)), rng.standard_normal((80, 6))
    b = a + 0.15
    difference = metrics.kid_difference_ci(a, b, reference)
    assert math.isclose(difference.value, metrics.kid(a, reference) - metrics.kid(b, reference), rel_tol=1e-9)
    single = metrics.kid_ci(a, reference)
    assert difference.high - difference.low < single.high - single.low
    assert metrics.kid_difference_ci(a, a, reference) == metrics.Interval(0.0, 0.0, 0.0, 80)


# Inception Score


def test_inception_score_of_uniform_is_one_and_of_balanced_one_hot_the_number_of_classes():
    assert math.isclose(metrics.inception_score(np.full((20, 5), 0.2)), 1.0, rel_tol=1e-9)
    assert math.isclose(metrics.inception_score(np.eye(5)[np.arange(20) % 5]), 5.0, rel_tol=1e-9)
    assert math.isclose(metrics.inception_score(np.eye(5)[np.zeros(20, int)]), 1.0, rel_tol=1e-9)


def test_inception_score_equals_numpy_and_its_interval_is_around_it():
    p = np.random.default_rng(0).dirichlet(np.full(4, 0.3), 50)
    mean = p.mean(0)
    expected = np.exp((p * np.log(p / mean)).sum(1).mean())
    assert math.isclose(metrics.inception_score(p), expected, rel_tol=1e-9)
    interval = metrics.inception_score_ci(p)
    assert math.isclose(interval.value, expected, rel_tol=1e-9) and interval.low < expected < interval.high
    with pytest.raises(ValueError, match="softmax"):
        metrics.inception_score(np.ones((3, 2)))


def test_inception_score_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    metrics.inception_score(np.random.default_rng(0).dirichlet(np.ones(4), 20), splits=4)
    assert torch.equal(torch.rand(1), expected)


# Each picture


def test_clip_scores_raw_and_clamped():
    assert metrics.clip_scores([0.3, -0.1]).tolist() == [0.3, -0.1]
    assert metrics.clip_scores([0.3, -0.1], clamped=True).tolist() == [30.0, 0.0]
    with pytest.raises(ValueError, match="cosine 25"):
        metrics.clip_scores([25.0])


def test_accuracy_counts_only_what_the_caption_tells():
    p = {"age": torch.eye(3)[[0, 1, 2]], "gender": torch.eye(2)[[0, 0, 1]], "place": torch.eye(2)[[1, 1, 1]]}
    values = {"age": ("young", "middle-aged", "old"), "gender": ("male", "female"), "place": ("sea", "city")}
    truth = [{"age": "young", "gender": "female", "place": "city"}, {"gender": "male", "place": "sea"}, {"age": "old"}]
    right = metrics.correct(p, values, truth)
    assert right["age"].tolist()[::2] == [1.0, 1.0] and math.isnan(right["age"][1])
    assert metrics.attribute_accuracy(right).tolist() == [0.5, 1.0, 1.0]
    context = metrics.context_accuracy(right)
    assert context[:2].tolist() == [1.0, 0.0] and math.isnan(context[2])
    with pytest.raises(ValueError, match="'ancient' is unknown"):
        metrics.correct(p, values, [{"age": "ancient"}] * 3)
    with pytest.raises(ValueError, match="one caption a picture"):
        metrics.correct(p, values, truth[:2])


def test_distances_are_zero_for_the_same_picture_and_grow_with_noise(scorer, images):
    assert np.allclose(metrics.perceptual_distance(scorer, images, images), 0, atol=1e-10)
    assert np.allclose(metrics.ssim(images, images), 1)
    generator = torch.Generator().manual_seed(1)
    near, far = ((images + s * torch.randn(images.shape, generator=generator)).clamp(0, 1) for s in (0.05, 0.5))
    assert (metrics.perceptual_distance(scorer, images, near) < metrics.perceptual_distance(scorer, images, far)).all()
    assert (metrics.ssim(images, near) > metrics.ssim(images, far)).all()
    with pytest.raises(ValueError, match="expected two equal"):
        metrics.ssim(images, images[:2])


def test_diversity_of_three_known_points():
    assert np.allclose(
        metrics.diversity(np.array([[1.0, 0.0], [0.0, 5.0], [2.0, 0.0]])), [2**0.5 / 2, 2**0.5, 2**0.5 / 2]
    )


# Intervals


def test_bootstrap_agrees_with_the_normal_interval_and_repeats():
    x = np.random.default_rng(0).standard_normal(400) + 2
    found = metrics.bootstrap_ci(x, seed=1)
    half = 1.96 * stats.sem(x)
    assert math.isclose(found.value, x.mean()) and found.n == 400
    assert abs(found.low - (x.mean() - half)) < 0.1 * half and abs(found.high - (x.mean() + half)) < 0.1 * half
    assert metrics.bootstrap_ci(x, seed=1) == found != metrics.bootstrap_ci(x, seed=2)


def test_bootstrap_draws_prompts_not_seeds():
    prompts = np.random.default_rng(0).standard_normal(40)
    once, copies = metrics.bootstrap_ci(prompts), metrics.bootstrap_ci(np.repeat(prompts[:, None], 9, axis=1))
    assert math.isclose(once.low, copies.low) and math.isclose(once.high, copies.high) and copies.n == 40
    holes = np.repeat(prompts[:, None], 2, axis=1)
    holes[:, 1] = np.nan
    holes[5] = np.nan
    assert metrics.bootstrap_ci(holes).n == 39 and math.isclose(
        metrics.bootstrap_ci(holes).value, np.delete(prompts, 5).mean()
    )
    holes[::2, 1] = prompts[::2]  # prompts of one and of two seeds: a shift of all values moves the interval by as much
    moved, stayed = metrics.bootstrap_ci(holes + 100), metrics.bootstrap_ci(holes)
    assert math.isclose(moved.low - 100, stayed.low, abs_tol=1e-9) and math.isclose(
        moved.high - 100, stayed.high, abs_tol=1e-9
    )
    with pytest.raises(ValueError, match="at least 2"):
        metrics.bootstrap_ci([1.0])


def test_pairing_removes_what_the_prompts_share():
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal(200) * 5
    a, b = prompt + 0.2 + 0.1 * rng.standard_normal(200), prompt
    paired = metrics.paired_difference_ci(a, b)
    assert 0 < paired.low < 0.2 < paired.high
    assert metrics.bootstrap_ci(a).high - metrics.bootstrap_ci(a).low > 10 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="same prompts"):
        metrics.paired_difference_ci(a, b[:5])


def test_share_of_all_right_is_not_certain():
    found = metrics.proportion_ci(np.ones(100))
    assert found.value == found.high == 1.0 and math.isclose(found.low, 0.025 ** (1 / 100))
    binomial = stats.binomtest(37, 60).proportion_ci(0.95, "exact")
    ours = metrics.proportion_ci(np.r_[np.ones(37), np.zeros(23), np.nan])
    assert math.isclose(ours.low, binomial.low) and math.isclose(ours.high, binomial.high) and ours.n == 60
    with pytest.raises(ValueError, match="each 0 or 1"):
        metrics.proportion_ci([0.5])


# Fairness


def test_groups_and_their_gap():
    rng = np.random.default_rng(0)
    labels = np.array(["asian", "african"] * 150 + ["indian"])
    values = np.where(labels == "asian", 0.9, 0.6) + 0.05 * rng.standard_normal(301)
    groups = metrics.by_group(values, labels)
    assert set(groups) == {"asian", "african"}  # one picture has no interval
    a, b = values[:300:2], values[1:300:2]
    gap, half = metrics.gap_ci(values, labels), 1.96 * math.hypot(stats.sem(a), stats.sem(b))
    assert math.isclose(gap.value, a.mean() - b.mean())
    assert abs(gap.low - (gap.value - half)) < 0.15 * half and abs(gap.high - (gap.value + half)) < 0.15 * half
    equal = metrics.gap_ci(rng.standard_normal(300), np.tile(["a", "b", "c"], 100))
    assert equal.low == 0.0
    with pytest.raises(ValueError, match="at least 2 for a gap"):
        metrics.gap_ci([1.0, 2.0], ["a", "a"])
    right = metrics.gap_ci(np.ones(20), np.tile(["a", "b"], 10))
    assert right.value == right.low == 0.0 and 0.2 < right.high < 0.6, "ten of ten are not a whole population"


def test_the_interval_of_a_gap_covers_the_true_one_though_the_largest_is_picked():
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(5), 12)
    shares = np.array([0.2, 0.9, 0.9, 0.9, 0.9])[labels]
    for what, draw, true, sure in (
        ("equal shares", lambda: rng.random(60) < 0.5, 0.0, False),
        ("equal means", lambda: rng.standard_normal(60) * (1 + labels), 0.0, False),
        ("one share less", lambda: rng.random(60) < shares, 0.7, True),
        ("one mean more", lambda: rng.standard_normal(60) + 2 * (labels == 0), 2.0, True),
    ):
        found = [metrics.gap_ci(draw(), labels) for _ in range(400)]
        assert np.mean([gap.low <= true <= gap.high for gap in found]) >= 0.95, what
        assert all(gap.low <= gap.value <= gap.high for gap in found), what
        assert not sure or np.mean([gap.low > 0 for gap in found]) > 0.8, what


def test_distance_from_the_pivot():
    pivot = {"age": "old", "gender": "male"}
    assert metrics.attribute_distance(pivot, pivot) == 0
    assert metrics.attribute_distance({"age": "young", "gender": "female"}, pivot) == 2
    with pytest.raises(ValueError, match="same attributes"):
        metrics.attribute_distance({"age": "old"}, pivot)


# Real worlds: random weights in the layouts of the real ones


class Detector(nn.Module):
    """The calls of inception-2015-12-05.pt, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.feature, self.output = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        x = self.feature(nn.functional.adaptive_avg_pool2d(img.float() / 255, [2, 2]).flatten(1))
        if return_features:
            return x
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return torch.softmax(x @ self.output.weight.t() + bias, dim=1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": 10,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    words = ["<s>", "</s>", "<unk>", "a", "photo", "of", "young", "old", "man", "person"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=12,
    ).save_pretrained(folder)
    inception = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.script(Detector()).save(str(inception))
    return inception, folder


def test_real_scorer_from_files_has_the_same_methods(real, images):
    inception, folder = real
    zero_shot = {"age": {"young": "a photo of a young person", "old": "a photo of a old person"}}
    scorer = metrics.scorer({"inception": inception, "clip": folder, "zero_shot": zero_shot, "local_files_only": True})
    assert scorer.features(images).shape == (7, 20)
    assert torch.allclose(scorer.probabilities(images).sum(1), torch.ones(7), atol=1e-5)
    assert scorer.attributes(images)["age"].shape == (7, 2) and scorer.values["age"] == ("young", "old")
    assert metrics.perceptual_distance(scorer, images, images).max() < 1e-10
    (folder / "clip").symlink_to(folder)
    (folder / "inception-2015-12-05.pt").symlink_to(inception)
    both = metrics.scorer(folder)
    assert torch.equal(both.features(images), scorer.features(images)) and set(both.values) == {
        "age",
        "gender",
        "ethnicity",
    }
    long = scorer.similarity(images, ["a photo of a young man"] * 6 + ["a " * 50])
    assert long.shape == (7,) and long.abs().max() <= 1


def test_clip_score_equals_transformers_own_processing(real):
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    inception, folder = real
    x = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(5))
    wide = nn.functional.interpolate(x, (32, 48), mode="bicubic").clamp(0, 1)
    scorer = metrics.load_real(inception, folder, {"age": {"old": "a old man"}}, local_files_only=True)
    ours = scorer.similarity(wide, ["a old man", "a young person"])
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pil = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in wide]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor(pil, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(
            pixel_values=pixels, **tokenizer(["a old man", "a young person"], padding=True, return_tensors="pt")
        )
    theirs = (out.image_embeds * out.text_embeds).sum(-1)
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_unreachable_real_models_are_named(real, tmp_path):
    inception, folder = real
    with pytest.raises(ValueError, match="no CLIP model at .*nowhere"):
        metrics.load_real(inception, tmp_path / "nowhere", local_files_only=True)
    with pytest.raises(ValueError, match="no Inception-v3 at .*missing.pt"):
        metrics.load_inception(tmp_path / "missing.pt")
    (tmp_path / "broken.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        metrics.load_inception(tmp_path / "broken.pt")
    (tmp_path / "weights.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match="torch-fidelity"):
        metrics.load_inception(tmp_path / "weights.pth")
