"""The model card beside a folder export."""

from engine.recipe.identity import flatten
from engine.recipe.load import loads
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
USES = {
    "timm": "import timm\n\nmodel = timm.create_model('local-dir:PATH', pretrained=True)",
    "torchvision": (
        "import torch, torchvision\nfrom safetensors.torch import load_file\n\n"
        "model = torchvision.models.{arch}()\nmodel.fc = torch.nn.Identity()\n"
        "model.load_state_dict(load_file('PATH/model.safetensors'), strict=True)"
    ),
    "transformers": (
        "from transformers import ViTModel\n\nmodel = ViTModel.from_pretrained('PATH', add_pooling_layer=False)\n"
        "features = model(pixel_values=images).last_hidden_state[:, 0]"
    ),
    "onnx": (
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession('PATH/model.onnx')\n"
        "features = session.run(None, {{'images': images}})[0]"
    ),
    "moco_v3": "import torch\n\nstate_dict = torch.load('PATH/checkpoint.pth.tar', weights_only=True)['state_dict']",
    "deit": "import torch\n\ntrunk = torch.load('PATH/model.pt', weights_only=True)['model']",
    "safetensors": "from safetensors.torch import load_file\n\ntensors = load_file('PATH/model.safetensors')",
}


def model_card(about: About, name: str, encoder: str, command: str) -> str:
    """Markdown with the front matter that model hubs read. `command`: the one that made the export."""
    licence = (about.licence or "FILL IN").lower() if about.licence else "# fill in"
    facts = {
        "architecture": f"{about.architecture.name} {about.architecture.arguments}",
        "encoder": "base and momentum, with heads" if name in ("moco_v3", "safetensors") else encoder,
        "images": f"{about.image_size} x {about.image_size}, RGB from 0 to 1",
        "mean, std": f"{list(about.mean)}, {list(about.std)}",
        "steps": "unknown" if about.step is None else about.step,
        "kNN top-1": "not measured" if about.knn_top1 is None else f"{about.knn_top1:.4f}",
        "data": "unknown",
    }
    recipe = ""
    if about.recipe is not None:
        values = flatten(loads(about.recipe, "recipe of the checkpoint"))
        source = values["data.dataset"] or values["data.root"]
        facts["data"] = f"{source} ({values['data.source']})"
        facts |= {key: values[key] for key in SHOWN}
        recipe = f"\n## Recipe\n\n```yaml\n{about.recipe.strip()}\n```\n"
    note = ""
    if about.licence:
        note = (
            f"\nThese weights come from files published under {about.licence}, which binds what is made of them too.\n"
        )
    how, learned = "pre-trained with MoCo v3", "self-supervised"
    if about.finetuned is not None:
        how, learned = f"{how} and fine-tuned on labels", "fine-tuned"
        facts["kNN top-1"] = "not measured after fine-tuning"
        recipe += f"\n## Recipe of fine-tuning\n\n```yaml\n{about.finetuned.strip()}\n```\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    use = USES[name].format(arch=about.architecture.name)
    return (
        f"---\nlicense: {licence}\ntags: [moco-v3, {learned}, feature-extraction]\n---\n\n"
        f"# {about.architecture.name}, {how}\n{note}\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{use}\n```\n\n## Made by\n\n```\n{command}\n```\n{recipe}"
    )
