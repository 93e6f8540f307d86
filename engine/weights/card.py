"""The model card beside a folder export."""

from pathlib import Path

from engine.recipe.identity import flatten
from engine.recipe.load import loads
from engine.weights.formats.table import format_page
from engine.weights.weights import REFERENCE_LICENCE, About, Weights

SHOWN = (
    "optimizer.name",
    "optimizer.base_lr",
    "optimizer.weight_decay",
    "train.global_batch_size",
    "train.epochs",
    "moco.temperature",
    "moco.momentum",
)


def model_card(weights: Weights, name: str, encoder: str, path: Path, command: str) -> str:
    """Markdown with the front matter that model hubs read.

    path: the folder beside whose files the card is. command: the one that made the export.
    """
    about, page = weights.known(), format_page(name)
    arch, licence, note = about.architecture.name, "unknown", ""
    if about.licence:
        licence = about.licence.lower()
    if about.licence == REFERENCE_LICENCE:
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
        f"## Use\n\n```python\n{_use(weights, page.use, path)}\n```\n\n## Made by\n\n```\n{command}\n```\n{recipes}"
    )


def _facts(about: About, encoder: str) -> dict[str, object]:
    facts = {
        "architecture": f"{about.architecture.name} {about.architecture.arguments}",
        "encoder": encoder,
        "images": f"{about.image_size} x {about.image_size}, RGB from 0 to 1",
        "photographs": "turned as cameras were held" if about.reading.exif_orientation else "as they lie in files",
        "mean, std": f"{list(about.mean)}, {list(about.std)}",
        "steps": "unknown" if about.step is None else about.step,
        "kNN top-1": "not measured" if about.knn_top1 is None else f"{about.knn_top1:.2%}",
        "data": "unknown",
        "licence": about.licence or "not stated",
    }
    if about.recipe is not None:
        values = flatten(loads(about.recipe, "recipe of the checkpoint"))
        source = values["data.dataset"] or values["data.root"]
        facts["data"] = f"{source} ({values['data.source']})"
        facts |= {key: values[key] for key in SHOWN}
    if about.finetuned is not None:
        facts["kNN top-1"] = "not measured after fine-tuning"
    return facts


def _use(weights: Weights, use: str, path: Path) -> str:
    about, crop = weights.known(), weights.crop
    transform = (
        "from PIL import Image\nfrom torchvision import transforms\n\n"
        "transform = transforms.Compose([\n"
        f"    transforms.Resize({crop.resized_side}, transforms.InterpolationMode('{crop.interpolation}')),\n"
        f"    transforms.CenterCrop({crop.size}),\n"
        "    transforms.ToTensor(),\n"
        f"    transforms.Normalize({list(about.mean)}, {list(about.std)}),\n"
        "])\nimage = transform(Image.open('photo.jpg').convert('RGB'))[None]"
    )
    use = use.replace("ARCH", about.architecture.name).replace("TRANSFORM", transform).replace("PATH", str(path))
    if not crop.reading.exif_orientation:
        return use
    photo = "Image.open('photo.jpg')"
    use = use.replace("from PIL import Image\n", "from PIL import Image, ImageOps\n")
    return use.replace(photo, f"ImageOps.exif_transpose({photo})")


def _yaml(title: str, recipe: str | None) -> str:
    return "" if recipe is None else f"\n## {title}\n\n```yaml\n{recipe.strip()}\n```\n"
