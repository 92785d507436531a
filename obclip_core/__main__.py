"""The command line: one prompt in, its candidates, the split, the bill and one picture out.

    python -m obclip_core "a smiling old woman by the sea" --protect age,gender,ethnicity -k 5 -o out.png

Exit status 0, or 2 with one sentence on stderr.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from obclip_core import prompts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}: see python -m obclip_core --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (the process's own by default) and return the exit status."""
    try:
        _generate(_parser().parse_args(arguments))
    except (ValueError, OSError, MemoryError) as why:
        sentence = " ".join(str(why).split()) or f"{type(why).__name__}, with no more said"
        print(f"obclip: {sentence}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m obclip_core", description="Make one picture from a prompt that the cloud does not "
                     "learn: it is offered all prompts that differ in the protected attributes.")
    parser.add_argument("prompt", help="the picture in words")
    parser.add_argument("--protect", default=",".join(prompts.ATTRIBUTES), metavar="A,B",
                        help="attributes to protect, of %(default)s (all by default)")
    parser.add_argument("-k", type=int, default=10, help="steps on the cloud (default %(default)s)")
    parser.add_argument("-T", type=int, help="steps in all (default: the world's)")
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"), help="PNG to write (default %(default)s)")
    parser.add_argument("--world", default="portraits", help="a world of data/worlds, or the path of one")
    parser.add_argument("--cloud", default="cloud", help="the world's cloud model (portraits also has cloud_lcm)")
    parser.add_argument("--seed", type=int, help="seed of the noise (default: a new one)")
    parser.add_argument("--coding", default="fp16", help="how latents travel: raw, fp16, int8, difference")
    parser.add_argument("--torch-device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 ...")
    return parser


def _generate(asked: argparse.Namespace) -> None:
    if asked.out.suffix.lower() != ".png":
        raise ValueError(f"the picture's name is {str(asked.out)!r}, expected one that ends in .png")
    if not asked.out.parent.is_dir():
        raise ValueError(f"there is no folder {asked.out.parent} to write the picture to: make it first")
    protect = tuple(name.strip() for name in asked.protect.split(",") if name.strip())
    prompt = prompts.parse(asked.prompt, protect=protect)
    texts, index = prompts.candidates(prompt), prompts.real_index(prompt)

    # after the prompt: it is refused in no time, these take seconds
    from obclip_core import cost, denoise, worlds
    from obclip_core.service import wire
    if asked.coding not in wire.CODINGS:
        raise ValueError(f"the coding is {asked.coding!r}, expected one of {', '.join(wire.CODINGS)}")
    world = worlds.load(asked.world, torch_device=asked.torch_device, cloud=asked.cloud)
    T = asked.T or world.T
    split = denoise.Split(T, asked.k, cloud_T=world.cloud_T)
    if world.cloud_T and 0 < split.k < world.cloud_T:
        shift = denoise.matching_shift(world.schedulers["cloud"], world.schedulers["device"], split)
        split = denoise.Split(T, asked.k, cloud_T=world.cloud_T, shift=shift)
    offer = denoise.Offer(texts, secrets.randbelow(2**32) if asked.seed is None else asked.seed, split)
    secret = denoise.Secret(index)

    print(f"candidates: {len(texts)}, all that the cloud sees of the prompt")
    print(*(f"  {n:>2}  {text}" for n, text in enumerate(texts)), sep="\n")
    for note in prompt.notes:
        print(f"note: {note.message}")
    print(f"split: {split.cloud_steps} steps on the cloud for all of them, {split.device_steps} on the device for one "
          f"(seed {offer.seed})")

    up, clock = wire.pack_offer(offer), [denoise.now(world)]
    down = wire.pack_hand_over(denoise.run(world, wire.unpack_offer(up)), asked.coding)
    clock.append(denoise.now(world))
    latent = denoise.finish(world, offer, wire.unpack_hand_over(down), secret)
    image = denoise.decode(world, latent)[0]
    clock.append(denoise.now(world))
    _write(image, asked.out)

    sent = (0, 0) if split.k == 0 else (len(up), len(down))
    print(f"bytes: {sent[0]} up, {sent[1]} down ({asked.coding}), {wire.seconds(sum(sent), 18.88):.2f} s at 18.88 Mbps")
    took = {"cloud": clock[1] - clock[0], "device": clock[2] - clock[1]}
    for side, steps, N in (("cloud", split.cloud_steps, len(texts)), ("device", split.device_steps, 1)):
        shape = cost.shape(world.unet(side), tokens=worlds.tokens(world))
        macs = cost.macs(shape, k=steps, candidates=N, guided=worlds.guided(world, side))
        print(f"{side}: {macs / 1e9:.1f} G multiply-adds, {took[side]:.2f} s")
    print(f"picture: {asked.out}")


def _write(image: object, out: Path) -> None:
    """Write a picture (3, H, W) in [0, 1] whole or not at all."""
    from PIL import Image
    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    handle, name = tempfile.mkstemp(suffix=".png", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG")
        os.replace(name, out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
