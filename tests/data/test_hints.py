import numpy as np
from PIL import Image

from engine.data.decode import AS_IT_IS, Reading
from engine.data.hints import hints
from engine.data.opening import open_source
from engine.data.orientation import TAG
from engine.data.source import Root
from tests.data.images import encoded, picture, png


def test_a_line_says_what_makes_dark_images_bright(tmp_path):
    def said(*values: int, reading: Reading = AS_IT_IS) -> list[str]:
        root = tmp_path / "-".join(map(str, values))
        root.mkdir(exist_ok=True)
        (root / "colour.png").write_bytes(png(9))
        (root / "broken.png").write_bytes(b"none")
        for i, value in enumerate(values):
            (root / f"{i}.png").write_bytes(encoded(Image.fromarray(np.full((2, 2), value, np.uint16)), "PNG"))
        return hints(open_source(Root("folder", root), "train"), reading)

    (line,) = said(3000, 4095)
    assert line.startswith("16-bit images hold values up to 4095 of 65535 (2 looked at)")
    assert "data.range=[0, 4095]" in line
    assert "[0, 16383]" in said(9000)[0]
    assert not said(3000, 4095, reading=Reading(range=(0, 4095)))
    assert said(3000, 60000) == said(0) == said() == []


def test_a_line_says_that_photographs_lie_on_their_side(tmp_path):
    """Where a tenth or more of them do; TIFFs are upright already."""

    def said(turned: int, upright: int, kind: str = "JPEG", reading: Reading = AS_IT_IS) -> list[str]:
        root = tmp_path / f"{turned}-{upright}-{kind}"
        root.mkdir(exist_ok=True)
        (root / "broken.jpg").write_bytes(b"none")
        for i in range(turned + upright):
            exif = Image.Exif()
            exif[TAG] = 6 if i < turned else 1
            (root / f"{i}.{kind.lower()}").write_bytes(encoded(picture(4, 3), kind, exif=exif.tobytes()))
        return hints(open_source(Root("folder", root), "train"), reading)

    for kind in ("JPEG", "PNG", "WEBP"):
        (line,) = said(2, 18, kind)
        assert line.startswith("2 of 20 looked at say that their camera was turned, and are taken as they lie; ")
        assert line.endswith("data.exif_orientation=true turns them upright")
    assert not said(2, 19)
    assert not said(0, 1)
    assert not said(3, 1, "TIFF")
    assert not said(2, 18, reading=Reading(exif_orientation=True))
