"""Recipes that the fuzzer once found refused without a reason, or, in trials of such mends, wrong."""

from __future__ import annotations

from fuzz import Recipe
from fuzz_program import Instruction, Moment

ROUNDING = [
    Recipe(
        sizes={"D": 2, "T": 2, "B": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=11),
            Instruction(op="hidden", on=52, variant=336),
            Instruction(op="module", on=12, variant=54019),
            Instruction(op="recurrent", on=44, variant=15666),
        ),
        children=(
            (
                Instruction(op="timed", on=15, variant=3298),
                Instruction(op="activate", on=6, variant=1),
                Instruction(op="activate", on=0, variant=3),
            ),
            (Instruction(op="activate", on=0, variant=3298),),
        ),
        loss="masked",
        forwards="gradient penalty",
        registered="model",
        engines="batch",
        moments=(
            Moment(batch=0, number=2, gate=0.5, training=False, flip=False, detached=True, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=False, flip=False, detached=True, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=6, gate=0.0, training=True, flip=False, detached=False, frozen=True),
        ),
        audited=False,
        seed=0,
    ),
    Recipe(
        sizes={"B": 2, "D": 2, "T": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=4),
            Instruction(op="module", on=49, variant=288),
            Instruction(op="module", on=35, variant=92),
            Instruction(op="norm", on=5, variant=0),
            Instruction(op="recurrent", on=37, variant=586),
            Instruction(op="hidden", on=27, variant=16402),
        ),
        children=(
            (Instruction(op="activate", on=16, variant=20642),),
            (Instruction(op="move", on=29, variant=1616), Instruction(op="activate", on=34, variant=1162)),
        ),
        loss="masked",
        forwards="intermediate result",
        registered="some modules",
        engines="both",
        moments=(
            Moment(batch=0, number=0, gate=-0.4, training=True, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=3, gate=0.0, training=False, flip=False, detached=True, frozen=True),
            Moment(batch=0, number=0, gate=0.5, training=False, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=8, gate=-0.4, training=True, flip=True, detached=True, frozen=True),
            Moment(batch=0, number=4, gate=0.5, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=0, number=10, gate=0.0, training=False, flip=True, detached=False, frozen=False),
        ),
        audited=False,
        seed=4130,
    ),
    Recipe(
        sizes={"B": 2, "T": 2, "D": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=1),
            Instruction(op="module", on=14, variant=1425),
            Instruction(op="linear", on=36, variant=50399),
            Instruction(op="hidden", on=26, variant=524),
            Instruction(op="norm", on=35, variant=513),
            Instruction(op="recurrent", on=26, variant=101),
        ),
        children=(
            (Instruction(op="ragged", on=38, variant=544),),
            (
                Instruction(op="ragged", on=38, variant=544),
                Instruction(op="activate", on=18, variant=681),
                Instruction(op="combine", on=26, variant=101),
            ),
        ),
        loss="every token, time first",
        forwards="micro-batches",
        registered="inner roots",
        engines="both",
        moments=(
            Moment(batch=0, number=2, gate=0.5, training=True, flip=True, detached=True, frozen=True),
            Moment(batch=0, number=2, gate=0.5, training=True, flip=True, detached=True, frozen=True),
            Moment(batch=0, number=4, gate=0.5, training=False, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=9, gate=0.0, training=True, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=2, gate=0.5, training=True, flip=True, detached=True, frozen=True),
        ),
        audited=False,
        seed=187,
    ),
    Recipe(
        sizes={"D": 2, "T": 2, "B": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=5),
            Instruction(op="hidden", on=50, variant=77),
            Instruction(op="norm", on=36, variant=149),
            Instruction(op="linear", on=27, variant=115287),
            Instruction(op="module", on=45, variant=25060),
            Instruction(op="hidden", on=29, variant=1486),
        ),
        children=(
            (Instruction(op="attend", on=60, variant=566),),
            (Instruction(op="hidden", on=42, variant=5973),),
        ),
        loss="two objectives",
        forwards="micro-batches",
        registered="model",
        engines="both",
        moments=(
            Moment(batch=0, number=10, gate=0.0, training=False, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=8, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=11, gate=0.0, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=0, number=7, gate=-0.4, training=False, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=6, gate=0.0, training=True, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=1, gate=0.0, training=True, flip=True, detached=False, frozen=False),
        ),
        audited=False,
        seed=558,
    ),
    Recipe(
        sizes={"T": 3, "B": 3, "D": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=11),
            Instruction(op="activate", on=3, variant=11),
            Instruction(op="activate", on=4, variant=50),
        ),
        children=((Instruction(op="activate", on=0, variant=0),),),
        loss="squares",
        forwards="one",
        registered="model",
        engines="batch",
        moments=(
            Moment(batch=0, number=0, gate=0.0, training=False, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=False, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=False, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=5, gate=-0.4, training=False, flip=True, detached=False, frozen=False),
        ),
        audited=False,
        seed=0,
    ),
    Recipe(
        sizes={"D": 4, "B": 3, "T": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=6),
            Instruction(op="timed", on=60, variant=3024),
            Instruction(op="gate", on=52, variant=0),
            Instruction(op="linear", on=14, variant=90384),
            Instruction(op="hidden", on=20, variant=323),
            Instruction(op="attend", on=29, variant=3972),
            Instruction(op="gate", on=6, variant=1002),
            Instruction(op="scale", on=39, variant=7728),
        ),
        children=((Instruction(op="convolve", on=2, variant=1),),),
        loss="squares",
        forwards="siamese",
        registered="model",
        engines="batch",
        moments=(
            Moment(batch=2, number=1, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=True, flip=False, detached=False, frozen=False),
        ),
        audited=False,
        seed=0,
    ),
]

# in mixed precision, with samples that depend on each other by little
WEAK = [
    Recipe(
        sizes={"T": 6, "D": 3, "B": 3, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=4),
            Instruction(op="rearrange", on=6, variant=796),
            Instruction(op="linear", on=33, variant=96),
            Instruction(op="child", on=8, variant=37944),
            Instruction(op="mix", on=32, variant=3136),
            Instruction(op="write", on=61, variant=469),
            Instruction(op="leak", on=48, variant=21142),
            Instruction(op="gate", on=42, variant=4096),
        ),
        children=(
            (Instruction(op="child", on=17, variant=2578), Instruction(op="hidden", on=56, variant=177)),
        ),
        loss="contrastive",
        forwards="siamese",
        registered="modules",
        engines="batch",
        moments=(
            Moment(batch=0, number=0, gate=0.0, training=True, flip=True, detached=False, frozen=False),
            Moment(batch=2, number=3, gate=-0.4, training=True, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=5, gate=0.5, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=0, number=9, gate=-0.4, training=True, flip=True, detached=False, frozen=False),
            Moment(batch=0, number=9, gate=0.5, training=True, flip=False, detached=True, frozen=True),
            Moment(batch=0, number=0, gate=0.0, training=True, flip=True, detached=False, frozen=False),
        ),
        audited=False,
        seed=38182,
    ),
    Recipe(
        sizes={"T": 3, "D": 4, "B": 3, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=11),
            Instruction(op="child", on=43, variant=195373),
            Instruction(op="scale", on=54, variant=36331),
            Instruction(op="mix", on=27, variant=113806),
            Instruction(op="derived", on=13, variant=1634),
            Instruction(op="scale", on=54, variant=36331),
            Instruction(op="activate", on=11, variant=41),
        ),
        children=((Instruction(op="activate", on=0, variant=0),),),
        loss="squares",
        forwards="one",
        registered="model",
        engines="batch",
        moments=(
            Moment(batch=0, number=0, gate=0.0, training=False, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=2, gate=0.0, training=False, flip=False, detached=True, frozen=False),
            Moment(batch=0, number=0, gate=0.0, training=False, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=4, gate=0.0, training=False, flip=True, detached=False, frozen=False),
        ),
        audited=False,
        seed=4,
    ),
    Recipe(
        sizes={"T": 6, "D": 3, "B": 3, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=12),
            Instruction(op="embed", on=21, variant=225),
            Instruction(op="embed", on=21, variant=225),
            Instruction(op="leak", on=12, variant=3886),
        ),
        children=(
            (Instruction(op="rearrange", on=20, variant=191),),
            (Instruction(op="rearrange", on=20, variant=191),),
        ),
        loss="matrix",
        forwards="siamese",
        registered="model",
        engines="both",
        moments=(
            Moment(batch=0, number=10, gate=0.0, training=False, flip=False, detached=True, frozen=True),
            Moment(batch=2, number=0, gate=0.0, training=False, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=1, gate=0.0, training=True, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=7, gate=0.5, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=0, number=10, gate=0.0, training=False, flip=False, detached=True, frozen=True),
        ),
        audited=False,
        seed=39909,
    ),
]

# an op that draws random numbers and returns a view was called twice
DISTURBED = [
    Recipe(
        sizes={"B": 3, "T": 3, "D": 2, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=4),
            Instruction(op="mix", on=11, variant=61),
            Instruction(op="child", on=2, variant=2198),
            Instruction(op="flow", on=40, variant=14979),
            Instruction(op="scale", on=9, variant=10389),
            Instruction(op="flow", on=8, variant=1),
            Instruction(op="embed", on=50, variant=43),
            Instruction(op="write", on=10, variant=758),
        ),
        children=(
            (
                Instruction(op="derived", on=19, variant=59575),
                Instruction(op="recurrent", on=48, variant=153),
                Instruction(op="recurrent", on=55, variant=759),
            ),
            (Instruction(op="recurrent", on=53, variant=11921),),
        ),
        loss="contrastive",
        forwards="gradient penalty",
        registered="roots",
        engines="both",
        moments=(
            Moment(batch=2, number=2, gate=0.0, training=True, flip=False, detached=True, frozen=True),
            Moment(batch=0, number=4, gate=0.0, training=False, flip=True, detached=True, frozen=True),
            Moment(batch=2, number=9, gate=0.0, training=False, flip=False, detached=False, frozen=False),
            Moment(batch=0, number=2, gate=0.0, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=1, number=7, gate=0.0, training=False, flip=True, detached=True, frozen=False),
            Moment(batch=1, number=5, gate=0.0, training=False, flip=False, detached=True, frozen=True),
        ),
        audited=False,
        seed=4644,
    )
]

# a gradient under autocast used a float32 parameter with a bfloat16 tensor
MIXED_DTYPES = [
    Recipe(
        sizes={"T": 6, "B": 3, "D": 4, "V": 8, "3": 3},
        body=(
            Instruction(op="linear", on=0, variant=12),
            Instruction(op="timed", on=59, variant=3250),
            Instruction(op="rearrange", on=51, variant=89313),
            Instruction(op="child", on=1, variant=255),
        ),
        children=((Instruction(op="write", on=19, variant=2471),),),
        loss="matrix",
        forwards="gradient penalty",
        registered="model",
        engines="none",
        moments=(
            Moment(batch=0, number=8, gate=0.5, training=False, flip=True, detached=True, frozen=True),
            Moment(batch=2, number=7, gate=0.5, training=True, flip=False, detached=False, frozen=True),
            Moment(batch=0, number=1, gate=-0.4, training=False, flip=True, detached=True, frozen=False),
            Moment(batch=0, number=4, gate=-0.4, training=False, flip=False, detached=True, frozen=False),
            Moment(batch=0, number=5, gate=0.0, training=True, flip=True, detached=True, frozen=False),
            Moment(batch=1, number=3, gate=0.0, training=False, flip=True, detached=False, frozen=False),
        ),
        audited=True,
        seed=5550,
    )
]
