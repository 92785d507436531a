"""Draws the pictures of the world `portraits`: avatars of python_avatars over backgrounds of our own.

How a value is drawn is a drawing convention (data_sheet.md) and says nothing about people.
"""

from __future__ import annotations

import io
import random

import numpy as np
import python_avatars as pa
import resvg_py
from PIL import Image

SIZE = 64  # pixels a side

# Composition carries ethnicity: where the figure stands (px right of the middle) and how far it leans (degrees).
POSE = {
    "caucasian": (-9.0, 0.0),
    "african": (0.0, 0.0),
    "asian": (0.0, -11.0),
    "indian": (0.0, 11.0),
    "european": (9.0, 0.0),
}
# Two ends of a range of natural skin tones; ranges of neighbouring values overlap.
SKIN = {
    "caucasian": ("#f3d3bd", "#cf9a76"),
    "european": ("#efcdb2", "#c48d66"),
    "asian": ("#ecc9a6", "#b98258"),
    "indian": ("#c99468", "#7c4f33"),
    "african": ("#9c6a47", "#43291c"),
}
HAIR = {
    "caucasian": ("#b98b4e", "#8a5a33", "#5b3a24", "#a4502f"),
    "european": ("#d2ab6a", "#6e4728", "#4a2f20", "#2f221b"),
    "asian": ("#1d1815", "#2b211b", "#3a2a20"),
    "indian": ("#1a1513", "#2a1f1a", "#40291c"),
    "african": ("#171210", "#241a16", "#33231b"),
}
GREY = ("#d9d9d6", "#c2c3c4", "#e8e7e3", "#b3b4b6")
# Age carries the framing: scale of the figure in the picture.
SCALE = {"young": 0.78, "middle-aged": 0.93, "old": 1.10}
TOP = {
    "male": tuple("SHORT_FLAT SHORT_ROUND SHORT_WAVED CAESAR CAESAR_SIDE_PART SHORT_CURLY BUZZCUT QUIFF".split()),
    "female": tuple("BOB LONG_NOT_TOO_LONG MIA_WALLACE STRAIGHT_1 STRAIGHT_STRAND BIG_HAIR CURVY LOOSE_HAIR".split()),
}
BEARD = ("BEARD_LIGHT", "BEARD_MEDIUM", "MOUSTACHE_FANCY", "MOUSTACHE_MAGNUM")
CLOTHING = {"hoodie": "HOODIE", "apron": "OVERALL", "sweater": "COLLAR_SWEATER", "shirt": "SHIRT_V_NECK"}
COLOUR = {
    "red": ("#b8322a", "#d4483e"),
    "blue": ("#2c5aa0", "#4a7fcb"),
    "green": ("#2f7d3b", "#57a45b"),
    "purple": ("#6a3d9a", "#9066b8"),
    "white": ("#f2f2ee", "#fdfdfb"),
}
ACCESSORY = {
    "without glasses": ("NONE",),
    "with glasses": ("PRESCRIPTION_2", "ROUND"),
    "with sunglasses": ("WAYFARERS", "SUNGLASSES"),
}
MOOD = {
    "smiling": (("BIG_SMILE", "SMILE"), ("HAPPY", "DEFAULT"), ("DEFAULT", "DEFAULT_NATURAL")),
    "serious": (("SERIOUS",), ("DEFAULT", "SIDE"), ("FLAT_NATURAL", "DEFAULT_NATURAL")),
    "surprised": (("SCREAM_OPEN",), ("SURPRISED",), ("RAISED_EXCITED", "RAISED_EXCITED_NATURAL")),
}


def mix(rng: random.Random, low: str, high: str) -> str:
    """A colour drawn evenly between two hex colours."""
    share = rng.random()
    a, b = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (low, high))
    return "#{:02x}{:02x}{:02x}".format(*np.rint(a + share * (b - a)).astype(int))


def background(rng: random.Random, place: str) -> str:
    """SVG shapes of one place on a 64 x 64 canvas."""
    j = lambda x, d=3.0: x + rng.uniform(-d, d)  # noqa: E731
    rect = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>'.format
    if place == "by the sea":
        horizon = j(34, 5)
        foam = [rect(rng.uniform(-6, 58), horizon + y, rng.uniform(8, 18), 1.4, "#e6f2f5") for y in (5, 12, 20)]
        sky = rect(0, 0, 64, 64, mix(rng, "#a9d6ee", "#cfe8f3"))
        return sky + rect(0, horizon, 64, 40, mix(rng, "#1f7fa8", "#3b97b8")) + "".join(foam)
    if place == "in a forest":
        trees = ""
        for x in (j(4), j(18), j(32), j(46), j(60)):
            y, w = j(8, 5), j(9, 2)
            green, foot = mix(rng, "#1e5a2e", "#3d8a45"), y + 40
            points = f"{x:.1f},{y:.1f} {x - w:.1f},{foot:.1f} {x + w:.1f},{foot:.1f}"
            trees += f'<polygon points="{points}" fill="{green}"/>'
        light = rect(0, 0, 64, 64, mix(rng, "#cfe6c4", "#b5d9a8"))
        return light + trees + rect(0, 50, 64, 14, mix(rng, "#4f7a3a", "#6b8f4a"))
    if place == "in a city":
        towers, x = "", j(-3, 2)
        while x < 64:
            w, top = rng.uniform(9, 15), rng.uniform(4, 30)
            towers += rect(x, top, w, 64, mix(rng, "#5f6770", "#8c949c"))
            for n in range(int(w // 5)):
                towers += "".join(rect(x + 2.5 + 4 * n, top + 3 + 7 * m, 2, 3, "#f3e3a3") for m in range(4))
            x += w + rng.uniform(0, 2)
        return rect(0, 0, 64, 64, mix(rng, "#c9d0d6", "#dde2e6")) + towers
    if place == "in the desert":
        x = rng.choice((8, 56)) + rng.uniform(-4, 4)
        sun = f'<circle cx="{x:.1f}" cy="{j(9):.1f}" r="{j(5.5, 1):.1f}" fill="#fff3c4"/>'
        a, b = j(36, 4), j(42, 4)
        sand = mix(rng, "#d9a860", "#c88f48")
        dunes = f'<path d="M0,{a:.1f} Q16,{a - 12:.1f} 34,{b:.1f} T64,{a:.1f} V64 H0 Z" fill="{sand}"/>'
        return rect(0, 0, 64, 64, mix(rng, "#f7d9a8", "#f3c98b")) + sun + dunes
    if place == "in a room":
        x = rng.choice((3, 45)) + rng.uniform(-2, 2)
        window = rect(x, j(8), 16, 20, "#fafafa") + rect(x + 1.5, 10, 13, 16, mix(rng, "#9ec9e2", "#c6dfec"))
        return (
            rect(0, 0, 64, 64, mix(rng, "#c9a7a0", "#b98c8c"))
            + window
            + rect(0, j(54, 2), 64, 12, mix(rng, "#6e4a3a", "#86604c"))
        )
    raise ValueError(f"no background is drawn for the place {place!r}")


def wrinkles(rng: random.Random, age: str) -> str:
    """Lines on forehead and cheeks, in avatar coordinates: none for young, two for middle-aged, six for old."""
    lines = {
        "young": "",
        "middle-aged": "M104,126 q-7,6 -6,14 M160,126 q7,6 6,14",
        "old": "M108,66 q24,-7 48,0 M112,75 q20,-6 40,0 M102,124 q-8,7 -7,17 M162,124 q8,7 7,17 "
        "M96,108 q8,5 16,2 M168,108 q-8,5 -16,2",
    }[age]
    return (
        f'<path d="{lines}" fill="none" stroke="#000" stroke-opacity="{rng.uniform(0.28, 0.42):.2f}" stroke-width="3"/>'
    )


def _figure(values: dict[str, str], rng: random.Random) -> tuple[pa.Avatar, str]:
    """The avatar of these values and its SVG transform in the picture."""
    age, gender, ethnicity = values["age"], values["gender"], values["ethnicity"]
    hair = rng.choice(GREY) if age == "old" else rng.choice(HAIR[ethnicity])
    mouths, eyes, brows = MOOD[values["mood"]]
    beard = rng.choice(BEARD) if gender == "male" and rng.random() < 0.5 else "NONE"
    avatar = pa.Avatar(
        style=pa.AvatarStyle.TRANSPARENT,
        background_color="#ffffff",
        top=pa.HairType[rng.choice(TOP[gender])],
        hair_color=hair,
        facial_hair=pa.FacialHairType[beard],
        facial_hair_color=hair,
        skin_color=mix(rng, *SKIN[ethnicity]),
        clothing=pa.ClothingType[CLOTHING[values["garment"]]],
        clothing_color=mix(rng, *COLOUR[values["colour"]]),
        accessory=pa.AccessoryType[rng.choice(ACCESSORY[values["accessory"]])],
        mouth=pa.MouthType[rng.choice(mouths)],
        eyes=pa.EyeType[rng.choice(eyes)],
        eyebrows=pa.EyebrowType[rng.choice(brows)],
        nose=pa.NoseType[rng.choice(("DEFAULT", "SMALL", "WIDE"))],
    )
    dx, lean = POSE[ethnicity]
    scale = SCALE[age] * rng.uniform(0.96, 1.04) * SIZE / 280
    x, turn = 32 + dx + rng.uniform(-1.5, 1.5), lean + rng.uniform(-2.5, 2.5)
    # The figure stands on the lower edge, and turns about the middle of that edge, so a lean moves the head.
    place = (
        f"translate({x:.2f},{SIZE + 3:.2f}) rotate({turn:.2f}) "
        f"scale({scale * rng.uniform(0.97, 1.03):.4f},{scale:.4f}) translate(-132,-280)"
    )
    return avatar, place


def _canvas(shapes: str) -> str:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="0 0 {SIZE} {SIZE}">{shapes}</svg>'


def draw_svg(values: dict[str, str], seed: int) -> str:
    """The SVG of one picture of these attribute and context values; `seed` decides everything that no word names."""
    rng = random.Random(seed)
    avatar, place = _figure(values, rng)
    body = avatar.render()
    body = body[body.index("<svg") :]
    behind = background(rng, values["place"])
    return _canvas(f'{behind}<g transform="{place}">{body}{wrinkles(rng, values["age"])}</g>')


def _pixels(svg: str) -> np.ndarray:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def draw(values: dict[str, str], seed: int) -> np.ndarray:
    """One picture, (64, 64, 3) uint8."""
    return _pixels(draw_svg(values, seed))


def where_words_show(values: dict[str, str], seed: int, size: int) -> np.ndarray:
    """Where this picture shows its mood (1: brows, eyes and mouth) and its garment (0.5), (size, size) in [0, 1]."""
    _, place = _figure(values, random.Random(seed))
    face = '<ellipse cx="132" cy="132" rx="46" ry="50" fill="#fff"/>'
    garment = '<rect x="56" y="186" width="152" height="94" fill="#808080"/>'
    black = f'<rect width="{SIZE}" height="{SIZE}"/>'
    large = _pixels(_canvas(f'{black}<g transform="{place}">{face}{garment}</g>'))[:, :, 0] / 255
    return large.reshape(size, SIZE // size, size, SIZE // size).mean((1, 3))
