"""A run that is taken up again is still the same run: its recipe, its base and its data are held against the first."""

import hashlib
import json
from collections.abc import Iterator

from ldm import config
from ldm.cli import warn
from ldm.data.latents import pictures_name
from ldm.data.shards import find_shards
from ldm.errors import DataError, ModelError, SettingError
from ldm.files import save_text
from ldm.training.diffusion import DiffusionTraining
from ldm.training.recipe import Recipe
from ldm.training.run import Run, network_digest
from ldm.training.workers import workers

RECIPE, BASE, DATA = "recipe.yaml", "base.json", "data.json"
# What may change once a stage has begun: how fast and how visibly, and how fast from now on is learned. Everything else
# would make the run another one than its name says.
FREE = (
    *("sample_prompts", "sample_every", "micro_batch_size", "compile", "gradient_checkpointing", "strategy"),
    *("save_every", "keep", "keep_best", "learning_rate", "steps", "workers", "timeout_s", "index", "resident"),
    "examples",
)

# What the stage of a section leaves last.
PRODUCTS = {
    "autoencoder_training": "autoencoder",
    "clip_training": "text",
    "thumbnail_training": "text-thumbnail",
    "evaluator_training": "evaluator",
    "lora_training": "lora",
    "inversion_training": "word",
    "consistency_training": "unet-consistency",
}


def begin(run: Run) -> None:
    """Note what the run is made from, or compare it with what was noted when it began.

    What is free to change is said. Raises SettingError for another recipe, ModelError for another base, and DataError
    for other shards, also where another process sees others.
    """
    data = data_of(run)
    free = {name for name, _, learned in latent_sets(run) if not learned}
    settled = {name: shards for name, shards in data.items() if name not in free}
    if any(other != settled for other in workers().gathered(settled)):
        raise DataError(
            "data: the processes do not see the same shards, by their names and sizes; mount the same folder on every "
            "machine"
        )
    if not workers().main:
        return
    path = run.folder / RECIPE
    if path.is_file():
        compare(settings(config.load(path, Recipe)), settings(run.recipe), run)
    save_text(path, config.dump(run.recipe))
    about = base_of(run)
    path = run.folder / BASE
    if path.is_file() and (before := json.loads(path.read_text())) != about:
        raise ModelError(
            f"--base: this run began with {before['name'] or 'none'} (sha256 {before['sha256'] or '-'}), now it is "
            f"{about['name'] or 'none'} (sha256 {about['sha256'] or '-'}); give the first again, or another --run-dir"
        )
    save_text(path, json.dumps(about, indent=2) + "\n")
    path = run.folder / DATA
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name in sorted(known.keys() & settled.keys()):
        if known[name] != settled[name]:
            raise DataError(
                f"{name}: these are not the shards that this run began with, by their names and sizes, so it would "
                "see others in another order; put those back, or use another --run-dir"
            )
    save_text(path, json.dumps({**known, **data}, indent=2) + "\n")


def data_of(run: Run) -> dict[str, str]:
    """A name for the shards of each local set, which changes with their number, names and sizes.

    Shards of latents may be missing, and be made anew, until the first checkpoint of the stage that reads them.
    """
    data, found = run.recipe.data, dict[str, str]()
    if data.shards is not None and data.mode == "indexed":
        found["data.shards"] = pictures_name(find_shards(data.shards))
    if data.mix is not None:
        found["data.mix.shards"] = pictures_name(find_shards(data.mix.shards))
    for name, pattern, learned in latent_sets(run):
        try:
            found[name] = pictures_name(find_shards(pattern))
        except DataError:
            if learned:
                raise
    return found


def latent_sets(run: Run) -> Iterator[tuple[str, str, bool]]:
    """Name and pattern of each set of cached latents, and whether a checkpoint has learned from it."""
    recipe = run.recipe
    stages: dict[str, tuple[str, DiffusionTraining | None]] = {
        **{f"unet_training.{i}": (f"unet-{i}", stage) for i, stage in enumerate(recipe.unet_training)},
        "lora_training": ("lora", recipe.lora_training),
        "inversion_training": ("inversion", recipe.inversion_training),
        "consistency_training": ("consistency", recipe.consistency_training),
    }
    for section, (name, stage) in stages.items():
        if stage is not None and stage.latents is not None:
            yield f"{section}.latents", stage.latents, run.checkpoints(name).is_dir()


def base_of(run: Run) -> dict[str, str]:
    """What the base is called, and a name for its networks that does not change with the format they lie in."""
    if run.base is None:
        return {"name": "", "sha256": ""}
    parts = "/".join(network_digest(run.base, part) for part in ("autoencoder", "text", "unet"))
    return {"name": run.base.name, "sha256": hashlib.sha256(parts.encode()).hexdigest()}


def settings(recipe: Recipe) -> dict[str, object]:
    """The values of a recipe by dotted name, and what follows for a UNet stage from those behind it: what it reads."""
    stages = recipe.unet_training
    trains = [any(one.train_text for one in stages[i:]) for i in range(len(stages))]
    reads = {f"unet_training.{i}.train_text, there or later": trains[i] for i in range(len(stages))}
    return flat(recipe.model_dump(mode="json")) | reads


def compare(before: dict[str, object], now: dict[str, object], run: Run) -> None:
    """Say which values of what has begun are others than before. Raises SettingError for the first that may not be."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or not begun(name, run):
            continue
        if not any(part in FREE for part in name.split(".")):
            raise SettingError(
                f"{run.folder}: this run began with another recipe, {name} was {old} and is {new}; "
                "use another --run-dir, or give the first recipe again"
            )
        warn(f"{name} was {old} and is {new}{', but that stage is finished' if over(name, run) else ' from here on'}")


def begun(name: str, run: Run) -> bool:
    """Whether something was learned under a setting: by its stage or by one behind it; of no stage, by any."""
    section, _, rest = name.partition(".")
    first = int(rest.partition(".")[0]) if section == "unet_training" else 0
    unets = [f"unet-{first + i}" for i in range(1 + len([*run.folder.glob("checkpoints/unet-*")]))]
    order = ["autoencoder", "clip", "thumbnail", *unets, "lora", "inversion", "consistency"]
    stage = unets[0] if section == "unet_training" else section.removesuffix("_training")
    learned = [*order, "evaluator"]
    if stage in learned:
        learned = order[order.index(stage) :] if stage in order else [stage]
    products = (PRODUCTS.get(f"{one}_training", one) for one in learned)
    return any(run.checkpoints(one).is_dir() for one in learned) or any(run.product(one).is_file() for one in products)


def over(name: str, run: Run) -> bool:
    """Whether the stage of a setting has left what it is for, so that nothing follows from the setting any more."""
    section, _, rest = name.partition(".")
    product = f"unet-{rest.partition('.')[0]}" if section == "unet_training" else PRODUCTS.get(section, "")
    return run.product(product).is_file()


def flat(values: object, name: str = "") -> dict[str, object]:
    """Nested values by dotted name."""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {name: values}
    found: dict[str, object] = {}
    for key, value in items:
        found |= flat(value, f"{name}.{key}" if name else key)
    return found
