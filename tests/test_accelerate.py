"""Accelerations: each does what its paper says, for one request, and leaves no trace."""

from __future__ import annotations

import json
import threading

import pytest
import tiny
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from obclip_core import denoise
from obclip_core.accelerate import LCM, NONE, PAPER_K5, PAPER_K10, Schedule, cache, deepcache, merge, reuse, skip, union

pytestmark = pytest.mark.usefixtures("no_grad")
N, K, TOKENS = 3, 6, 7
KEEPING = {
    "cache": Schedule.points(K, 2, refresh=3, reuse=False), "skip": Schedule.points(K, s=2),
    "encoder": Schedule.every("encoder", K, 3), **{f"deepcache {m}": Schedule.every("deepcache", K, 3, branch=m)
                                                   for m in (0, 1, 2)},
}
ALL = {**KEEPING, "reuse": Schedule(reuse=(0, 1, 2)), "tgate": Schedule.gate(K, 3), "merge": Schedule(merge=(1, 2)),
       "paper": Schedule.points(K, 2, 3), "paper and gate": union([Schedule.points(K, 2, 3), Schedule.gate(K, 4)])}


def batch(seed=0, n=N, branches=2, same=False):
    """Latents and text of n candidates in cat([unconditional, conditional]) order."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(1 if same else n, 4, 8, 8, generator=g).expand(n, -1, -1, -1)
    text = torch.randn(1 if same else n, TOKENS, 32, generator=g).expand(n, -1, -1)
    empty = torch.randn(1, TOKENS, 32, generator=g).expand(n, -1, -1)
    return z.repeat(branches, 1, 1, 1), torch.cat([empty, text][-branches:])


def walk(unet, schedule, seed=0, *, chunk=N, still=False, same=False, each=lambda step: None, steps=K):
    """The U-Net's outputs (steps, 2 N, C, h, w); ``still`` gives every step the same input."""
    z, text = batch(seed, same=same)
    outputs = torch.zeros(steps, *z.shape)
    with schedule.applied(unet, candidates=N) as at:
        for step in range(steps):
            each(step)
            for start in range(0, N, chunk):
                rows = [*range(start, min(start + chunk, N)), *range(N + start, N + min(start + chunk, N))]
                x, t = (z, 500) if still else (z * (1 + 0.2 * step), 900 - 90 * step)
                with at(step, slice(start, start + chunk)):
                    outputs[step, rows] = unet(x[rows], t, encoder_hidden_states=text[rows], return_dict=False)[0]
    return outputs


def trace(unet):
    """All that a request could leave behind on a U-Net."""
    return {name: (sorted(vars(module)), module.forward.__func__, len(module._forward_hooks), type(module),
                   [getattr(module, "processor", None)]) for name, module in unet.named_modules()}


# -------------------- for every technique

@pytest.mark.parametrize("name", ALL)
def test_on_it_changes_the_output_off_it_does_not_and_afterwards_nothing_is_left(unet, name):
    before, weights = trace(unet), {key: value.clone() for key, value in unet.state_dict().items()}
    plain, fast = walk(unet, NONE), walk(unet, ALL[name])
    off = [step for step in range(K) if not ALL[name].on(step)]
    assert torch.equal(fast[off], plain[off])
    assert all(not torch.equal(fast[step], plain[step]) for step in range(K) if step not in off)
    assert trace(unet) == before
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())
    assert torch.equal(walk(unet, NONE), plain)


@pytest.mark.parametrize("name", ["reuse", "cache", "tgate", "deepcache 1", "paper and gate"])
def test_chunks_of_candidates_make_no_difference(unet, name):
    assert torch.allclose(walk(unet, ALL[name], chunk=2), walk(unet, ALL[name]), atol=1e-5)


def test_points_at_the_end_are_no_acceleration_bit_for_bit(unet):
    assert Schedule.points(K, K, K) == Schedule.points(10, 25, 25) == NONE
    assert torch.equal(walk(unet, Schedule.points(K, 25, 25)), walk(unet, NONE))
    one = Schedule(reuse=(0, 1))
    z, text = batch(n=1)
    with one.applied(unet, candidates=1) as at, at(0):
        alone = unet(z, 500, encoder_hidden_states=text).sample
    assert torch.equal(alone, unet(z, 500, encoder_hidden_states=text).sample)  # a pivot alone


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_kept_is_what_would_have_been_computed(unet, name):
    """With the same input at every step, keeping changes nothing: bit for bit."""
    assert torch.equal(walk(unet, KEEPING[name], still=True), walk(unet, NONE, still=True))


@pytest.mark.parametrize("options", [dict(device=True, **tiny.SMALL), dict(layers_per_block=1, **tiny.SMALL,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))])
def test_other_unets_with_and_without_mid_block_and_attention(options):
    unet = tiny.unet(**options).eval()
    plain, still = walk(unet, NONE, steps=3), walk(unet, NONE, still=True, steps=3)
    for schedule in (Schedule.points(3, 1, 2), Schedule(encoder=(1, 2)), Schedule(deepcache=(1, 2)),
                     Schedule(deepcache=(1, 2), branch=1)):
        assert not torch.equal(walk(unet, schedule, steps=3)[1:], plain[1:])
        alone = Schedule(**{name: schedule.steps(name) for name in schedule.techniques if name != "reuse"},
                         branch=schedule.branch)
        assert torch.equal(walk(unet, alone, still=True, steps=3), still)


@pytest.mark.parametrize("where", ["between calls", "in the U-Net"])
def test_an_exception_leaves_nothing_behind(unet, where):
    before, plain = trace(unet), walk(unet, NONE)
    held = []
    with pytest.raises((RuntimeError, ValueError)):
        with ALL["paper and gate"].applied(unet, candidates=N) as at:
            held.append(at)
            z, text = batch()
            with at(0):
                unet(z, 500, encoder_hidden_states=text)
            assert at.bytes() > 0
            with at(5):
                if where == "between calls":
                    raise RuntimeError("the wire broke")
                unet(z[:, :3], 500, encoder_hidden_states=text)
    assert trace(unet) == before
    assert held[0].bytes() == 0
    assert torch.equal(walk(unet, NONE), plain)


def test_requests_in_threads_on_one_unet_do_not_meet(unet):
    plans = [ALL["paper"], ALL["encoder"], NONE, ALL["tgate"]]
    alone = [walk(unet, plan, seed) for seed, plan in enumerate(plans)]
    together, barrier, before = [None] * len(plans), threading.Barrier(len(plans)), trace(unet)

    def work(seed):
        with torch.no_grad():
            together[seed] = walk(unet, plans[seed], seed, each=lambda step: barrier.wait(60))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert trace(unet) == before


def test_a_request_stays_in_its_brackets_and_on_its_unet(unet):
    other = tiny.unet(**tiny.SMALL).eval()
    z, text = batch()
    plain, others = walk(unet, NONE), other(z, 500, encoder_hidden_states=text).sample
    with Schedule(reuse=(0,)).applied(unet, candidates=N) as at:
        assert torch.equal(unet(z, 900, encoder_hidden_states=text).sample, plain[0])
        with at(0):
            assert torch.equal(other(z, 500, encoder_hidden_states=text).sample, others)
            assert not torch.equal(unet(z, 900, encoder_hidden_states=text).sample, plain[0])
        with Schedule(skip=(1,)).applied(unet, candidates=N) as inner:  # a request inside another
            with inner(0):
                assert torch.equal(unet(z, 900, encoder_hidden_states=text).sample, plain[0])
        with at(0):
            assert not torch.equal(unet(z, 900, encoder_hidden_states=text).sample, plain[0])


def test_an_offer_is_accelerated_and_in_chunks_too(tiny_world):
    def cloud(schedule, limit=None):
        offer = denoise.Offer(tiny.CANDIDATES[:3], 7, denoise.Split(T=6, k=4), schedule)
        return denoise.run(tiny_world, offer, memory_limit=limit).latents

    plain, fast = cloud(None), cloud(Schedule.points(4, 2, 3))
    assert torch.equal(cloud(NONE), plain)
    assert not torch.equal(fast, plain)
    assert torch.allclose(cloud(Schedule.points(4, 2, 3), limit=1), fast, atol=1e-4)


# -------------------- technique by technique

class OfThePivot(AttnProcessor):
    """Algorithm 2 the long way: all maps are computed, and each branch's are overwritten by its pivot's."""

    def __init__(self, pivot):
        self.pivot = pivot

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        maps = attn.get_attention_scores(q, k).unflatten(0, (2, N, attn.heads))
        maps = maps[:, self.pivot, None].expand_as(maps).flatten(0, 2)
        return attn.to_out[0](attn.batch_to_head_dim(maps @ v))


@pytest.mark.parametrize("pivot", [0, 2])
def test_reuse_is_algorithm_2_in_both_forms(unet, pivot):
    fused, plain = (walk(unet, Schedule(reuse=(0, 1), pivot=pivot, plain=form), steps=2) for form in (False, True))
    processors = dict(unet.attn_processors)
    unet.set_attn_processor(OfThePivot(pivot))
    long_way = walk(unet, NONE, steps=2)
    unet.set_attn_processor(processors)
    assert torch.allclose(fused, long_way, atol=1e-5)
    assert torch.allclose(plain, long_way, atol=1e-5)


def test_reuse_of_equal_candidates_changes_nothing(unet):
    assert torch.allclose(walk(unet, Schedule(reuse=(0, 1)), same=True, steps=2), walk(unet, NONE, same=True, steps=2),
                          atol=1e-5)


def test_reuse_leaves_the_pivot_as_it_is_and_needs_its_chunk_first(unet):
    plain, fast = walk(unet, NONE, steps=1)[0], walk(unet, Schedule(reuse=(0,), pivot=1), steps=1)[0]
    assert torch.allclose(fast[[1, N + 1]], plain[[1, N + 1]], atol=1e-5)
    with pytest.raises(ValueError, match="pivot 2 is not among candidates 0..0"):
        walk(unet, Schedule(reuse=(0,), pivot=2), chunk=1, steps=1)
    with pytest.raises(ValueError, match="attention mask"):
        z, text = batch()
        with Schedule(reuse=(0,)).applied(unet, candidates=N) as at, at(0):
            unet(z, 1, encoder_hidden_states=text, encoder_attention_mask=torch.ones(2 * N, TOKENS))


def test_cache_equals_pyramid_attention_broadcast(unet):
    ours = walk(unet, Schedule(cache=(1, 2, 4, 5)))
    every = tiny.unet(**tiny.SMALL).eval()
    every.load_state_dict(unet.state_dict())
    apply_pyramid_attention_broadcast(every, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1000), cross_attention_timestep_skip_range=(-1, 1000),
        spatial_attention_block_identifiers=("attn1",), cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: 500))
    assert torch.equal(walk(every, NONE), ours)


def test_cached_cross_attention_output_is_the_cached_map_times_values(unet):
    """The paper keeps the map; with a fixed text its product with the values is the kept output."""
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    hidden, (_, text) = torch.randn(N, 16, 8), batch(branches=1)
    q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text)))
    kept_map = attn.get_attention_scores(q, k)
    again = attn.to_out[0](attn.batch_to_head_dim(kept_map @ attn.head_to_batch_dim(attn.to_v(text))))
    assert torch.allclose(attn(hidden, encoder_hidden_states=text), again, atol=1e-6)


def test_skip_still_sees_the_latent_and_encoder_propagation_does_not(unet):
    z, text = batch()
    for schedule, sees in ((Schedule(skip=(1,)), True), (Schedule(encoder=(1,)), False)):
        answers = []
        for latent in (z, z + 1):
            with schedule.applied(unet, candidates=N) as at:
                with at(0):
                    unet(z, 900, encoder_hidden_states=text)
                with at(1):
                    answers.append(unet(latent, 800, encoder_hidden_states=text).sample)
        assert torch.equal(*answers) != sees


def test_tgate_runs_one_branch_on_the_mean_cross_attention(unet):
    fast = walk(unet, Schedule.gate(K, 3))
    assert torch.equal(fast[3:, :N], fast[3:, N:])  # any guidance scale returns the one prediction
    z, text = batch()
    means, hooks = {}, []
    cross = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    for name, module in cross.items():
        hooks.append(module.register_forward_hook(lambda m, a, out, name=name: means.update({name: out.unflatten(
            0, (2, N)).mean(0)})))
    unet(z * 1.4, 720, encoder_hidden_states=text)  # step 2
    for hook in hooks:
        hook.remove()
    hooks = [module.register_forward_hook(lambda m, a, out, name=name: means[name]) for name, module in cross.items()]
    expected = unet((z * 1.6)[N:], 630, encoder_hidden_states=text[N:]).sample
    for hook in hooks:
        hook.remove()
    assert torch.equal(fast[3, N:], expected)


def test_merge_averages_like_tokens_and_puts_them_back(unet):
    hidden = torch.zeros(1, 16, 4)
    hidden[..., 0] = 1
    hidden[0, :, 1] = torch.arange(16.0) / 100

    class Call:
        request = type("R", (), {"within": {"merge shape": (4, 4), "merge tokens": hidden},
                                 "schedule": Schedule(merge=(0,), merge_ratio=0.5)})

        @staticmethod
        def on(name):
            return True

    seen = []
    out = merge.forward(Call, "block.attn1", None, lambda x: seen.append(x) or x, hidden)
    assert seen[0].shape == (1, 8, 4)
    assert merge.merged(4, 4, 0.5) == (8, 4) and merge.merged(4, 4, 0.9) == (4, 4)
    assert out.shape == hidden.shape and len(out[0].unique(dim=0)) == 8
    assert not torch.equal(out, hidden) and torch.allclose(out, hidden, atol=0.16)
    assert merge.grid((10, 6), 2 * 3) == (3, 2) and merge.grid((10, 6), 15) == (5, 3)
    assert len(list(merge.modules(unet, Schedule(merge=(0,))))) < len(list(merge.modules(
        unet, Schedule(merge=(0,), merge_depth=1))))


def test_merge_equals_tomesd(unet):
    tomesd = pytest.importorskip("tomesd")
    ours = walk(unet, Schedule(merge=(0,), merge_ratio=0.4), steps=1)
    patched = tiny.unet(**tiny.SMALL).eval()
    patched.load_state_dict(unet.state_dict())
    tomesd.apply_patch(patched, ratio=0.4, use_rand=False)
    assert torch.allclose(walk(patched, NONE, steps=1), ours, atol=1e-5)


# -------------------- schedule

def test_the_papers_settings():
    assert PAPER_K5.reuse == (0, 1, 2) and PAPER_K5.cache == (3, 4) and PAPER_K5.skip == (3, 4)
    assert PAPER_K10.reuse == (0, 1, 2, 3) and PAPER_K10.skip == (6, 7, 8, 9)
    assert PAPER_K10.cache == (4, 5, 6, 7, 9)  # attention is computed at steps 3 and 8
    assert (PAPER_K10.r, PAPER_K10.s) == (4, 6)
    assert LCM == Schedule(reuse=(0, 1), cache=(2, 3))
    assert Schedule.every("deepcache", 6, 3, first=1).deepcache == (2, 3, 5)
    assert PAPER_K10.on(4) == {"cache"} and PAPER_K10.on(0) == {"reuse"} and PAPER_K10.on(20) == frozenset()


def test_union_keeps_steps_and_settings_of_all():
    both = union([Schedule(merge=(2,), merge_depth=1), Schedule.every("deepcache", 4, 2, branch=1),
                  Schedule(merge=(1,))])
    assert both == Schedule(merge=(1, 2), merge_depth=1, deepcache=(1, 3), branch=1)
    assert union([]) == NONE


@pytest.mark.parametrize("schedule", [NONE, PAPER_K10, *ALL.values()])
def test_a_schedule_travels_as_plain_data(schedule):
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize("wrong, words", [
    (dict(cache=(0,)), "step 0, where nothing is kept"), (dict(reuse=(1, 0)), "ascending"), (dict(reuse=(-1,)), "0 up"),
    (dict(reuse=(True,)), "whole steps"), (dict(skip=(1,), encoder=(2,)), "one of them"), (dict(pivot=-1), "pivot"),
    (dict(reuse=(1,), merge=(1,)), r"\[1\]"), (dict(tgate=(1, 3)), "one run"),
    (dict(merge_ratio=1.0), "between 0 and 1"),
])
def test_a_schedule_that_cannot_work_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**wrong)


@pytest.mark.parametrize("data", [None, {"speed": 1}, {"reuse": 3}, {"cache": [0]}, {"skip": ["1"]}, {"skip": "12"},
                                  {"pivot": "a"}, {"merge_ratio": "a"}, {"plain": 1}])
def test_wrong_plain_data_is_refused(data):
    with pytest.raises(ValueError):
        Schedule.from_dict(data)


def test_wrong_uses_are_refused_by_name(unet):
    with pytest.raises(ValueError, match="pivot is 5 of 3"):
        with Schedule(reuse=(0,), pivot=5).applied(unet, candidates=3):
            pass
    with pytest.raises(ValueError, match="Linear, expected a UNet2DConditionModel"):
        with Schedule(cache=(1,)).applied(torch.nn.Linear(1, 1), candidates=1):
            pass
    blind = tiny.unet(**tiny.SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                      mid_block_type=None)
    for technique in ("cache", "reuse", "tgate", "merge"):
        with pytest.raises(ValueError, match=f"{technique} finds nothing to act on"):
            with Schedule(**{technique: (1,)}).applied(blind, candidates=1):
                pass
    with pytest.raises(ValueError, match="branch is 3, expected 0..2"):
        with Schedule(deepcache=(1,), branch=3).applied(unet, candidates=1):
            pass
    z, text = batch()
    with Schedule(cache=(1,)).applied(unet, candidates=N) as at:
        with pytest.raises(ValueError, match="run all steps from 0"), at(1):
            unet(z, 1, encoder_hidden_states=text)
        with pytest.raises(ValueError, match="expected a step"), at(0, slice(3, 4)):
            pass
    unet.set_attn_processor(SlicedAttnProcessor(1))
    before = trace(unet)
    for technique in ("cache", "reuse", "tgate", "merge"):
        with pytest.raises(ValueError, match="SlicedAttnProcessor"):
            with Schedule(**{technique: (1,)}).applied(unet, candidates=N):
                pass
    assert trace(unet) == before
    unet.set_default_attn_processor()


def test_each_technique_is_a_file_with_a_name():
    assert {module.NAME for module in (reuse, cache, skip, deepcache, merge)} <= set(Schedule().to_dict())
