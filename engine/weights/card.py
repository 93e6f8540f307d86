"""The model card beside a folder export."""

from engine.recipe.identity import flatten
from engine.recipe.load import loads
from engine.weights.formats.table import format_page
from engine.weights.weights import About

SHOWN = (
    "optimizer.name",
    "optimizer.base_lr",
    "optimizer.weight_decay",
    "train.global_batch_size",
    "train.epochs",
    "moco.temperature",
    "moco.momentum",
)


def model_card(about: About, name: str, encoder: str, command: str) -> str:
    """Markdown with the front matter that model hubs read. `command`: the one that made the export."""
    page, arch = format_page(name), about.architecture.name
    licence, note = "# fill in", ""
    if about.licence:
        licence = about.licence.lower()
        note = (
            f"\nThese weights come from files published under {about.licence}, which binds what is made of them too.\n"
        )
    facts = _facts(about, "base and momentum, with heads" if page.whole else encoder)
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    how, learned = "pre-trained with MoCo v3", "self-supervised"
    if about.finetuned is not None:
        how, learned = f"{how} and fine-tuned on labels", "fine-tuned"
    recipes = _yaml("Recipe", about.recipe) + _yaml("Recipe of fine-tuning", about.finetuned)
    return (
        f"---\nlicense: {licence}\ntags: [moco-v3, {learned}, feature-extraction]\n---\n\n"
        f"# {arch}, {how}\n{note}\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{page.use.replace('ARCH', arch)}\n```\n\n## Made by\n\n```\n{command}\n```\n{recipes}"
    )


def _facts(about: About, encoder: str) -> dict[str, object]:
    facts = {
        "architecture": f"{about.architecture.name} {about.architecture.arguments}",
        "encoder": encoder,
        "images": f"{about.image_size} x {about.image_size}, RGB from 0 to 1",
        "mean, std": f"{list(about.mean)}, {list(about.std)}",
        "steps": "unknown" if about.step is None else about.step,
        "kNN top-1": "not measured" if about.knn_top1 is None else f"{about.knn_top1:.4f}",
        "data": "unknown",
    }
    if about.recipe is not None:
        values = flatten(loads(about.recipe, "recipe of the checkpoint"))
        source = values["data.dataset"] or values["data.root"]
        facts["data"] = f"{source} ({values['data.source']})"
        facts |= {key: values[key] for key in SHOWN}
    if about.finetuned is not None:
        facts["kNN top-1"] = "not measured after fine-tuning"
    return facts


def _yaml(title: str, recipe: str | None) -> str:
    return "" if recipe is None else f"\n## {title}\n\n```yaml\n{recipe.strip()}\n```\n"
