import numpy as np
from PIL import Image

from engine.data.decode import AS_IT_IS, Reading
from engine.data.hints import hints
from engine.data.opening import open_source
from engine.data.source import Root
from tests.data.images import encoded, png


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
