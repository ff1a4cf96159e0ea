"""The table of architectures: ``python -m tests.architectures.table`` writes docs/architectures.md.

It builds, merges and searches all of them, in a few minutes, and needs diffusers.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from mergesearch.merging.tensors.roles import block_axes, roles_of
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.denoisers import DENOISERS, INSTALLED
from tests.architectures.evaluations import kinds_of
from tests.architectures.structure import NAMES, shapes_of, share_without_a_role

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
#: Number of columns after the name that tell the structure; the others tell what works.
STRUCTURE = 4
_STEPS = ("check", "task_arithmetic", "ties", "tsv", "dare_ties", "regmean", "study")
_COLUMNS = ("architecture", "class", "without a role", "blocks of each tower", "evaluator", *_STEPS)

_HEAD = """# Architectures

What is known of a model is read from the names of its tensors: towers and their blocks from how the
names are nested, and what each tensor is (attention, MLP, norm, convolution, state space,
embedding, projector, head) from their words. Nothing has to be registered; other architectures with
names of the same make work as well, and `mergesearch check` shows the groups that it finds.

- **Tower**: a stack of numbered blocks with a depth axis of its own, such as a vision encoder and a
  language model. Stages (Swin, ConvNeXt, ResNet) and the down, middle and up blocks of a UNet count
  as one axis in order: `block 0.1` is the second block of the first stage. The main tower has no
  label.
- **Without a role**: share of the parameters of which it is not known what they are; at most 0.05
  in every row.
- **check, study**: `mergesearch check`, and a study of ten trials with a coefficient for each block
  and part, scored by the evaluator of the model's kind (**evaluator**) on items that are made for
  it. All trials have finite values, and the values differ.
- **Operators**: `mergesearch merge` with the operator at its defaults; the result is loaded again,
  and no key is missing or left over. RegMean needs a model that runs.
- `alignment` compares answers with those of each domain's expert. It stands where there is no
  evaluator of the kind (masked words, detection of objects), and for Qwen2-VL and InternVL, whose
  processors transformers does not open without torchvision, so that `visual_questions` refuses
  them without it. `distance` stands where nothing else runs: ViT-MAE hides parts of pictures at
  random, and class prompts for sounds (CLAP) are not evaluated yet.
- BLIP-2 and Florence-2 have no chat template: `visual_questions` asks them by its key `prompt`.
- A folder of diffusers is loaded as the class that it names, if diffusers is installed, and scored
  by a function (`kind: python`). A pipeline is opened at its `unet` or `transformer`; its other
  models are taken over from the base, as hard links where source and target are on one disk.
- Models that are known by names alone (timm and original checkpoints) are merged from their
  tensors. A study of them has a function that builds them (`kind: python`,
  `model_class: module:name`), here one that computes nothing.
- Models with batch normalisation need `special: {batch_norm: ...}`; here it is `base`.

Groups of a study's own are in [study-file.md](study-file.md#groups-of-your-own). All models in the
table are tiny. The table is written by `python -m tests.architectures.table`; `make test` checks
its first columns and four rows, `make test-slow` all of them.

"""


def described(name: str) -> list[str]:
    """The cells of the structure."""
    shapes = shapes_of(name)
    axes = block_axes(roles_of(shapes).values())
    towers = ", ".join(f"{tower or 'main'} {len(blocks)}" for tower, blocks in axes.items())
    built = ARCHITECTURES.get(name) or DENOISERS.get(name)
    model = "names alone" if built is None else f"`{built.model}`"
    evaluators = ", ".join(f"`{kind}`" for kind in kinds_of(name))
    return [model, f"{share_without_a_role(shapes):.3f}", towers, evaluators]


def rows_of(text: str) -> dict[str, list[str]]:
    """Architecture -> its other cells, from the page."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: others for name, *others in cells}


def page() -> str:
    """The page, after trying everything out."""
    from tests.architectures.trial import try_out

    if not INSTALLED:
        raise SystemExit("expected diffusers to be installed: pip install diffusers")
    rows = [_line(_COLUMNS), "|" + "---|" * len(_COLUMNS)]
    for name in NAMES:
        with TemporaryDirectory() as folder:
            outcomes = try_out(name, Path(folder))
        rows.append(_line([name, *described(name), *(outcomes[step] for step in _STEPS)]))
        print(rows[-1], flush=True)
    return _HEAD + "\n".join(rows) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
