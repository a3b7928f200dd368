from __future__ import annotations

import pytest
import torch

from qe_edge.system import device
from qe_edge.system.device import CPU, choose_device, moved, multiplies_bfloat16, multiplies_int8, to_device
from qe_edge.system.errors import ResourceError


def test_a_device_is_chosen_by_name() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["tpu", "meta", "gpu0", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ResourceError, match=name):
        choose_device(name)


def test_containers_keep_their_kinds_on_the_way() -> None:
    value = {"mask": (torch.ones(2), None), "more": [torch.zeros(1), 3]}
    meta = to_device(value, torch.device("meta"))
    assert isinstance(meta["mask"], tuple)
    assert meta["mask"][0].device.type == meta["more"][0].device.type == "meta"
    assert meta["mask"][1] is None
    assert meta["more"][1] == 3


def test_a_full_device_says_what_to_do_and_gives_the_module_back() -> None:
    module = torch.nn.Linear(2, 2)
    elsewhere = torch.device("cpu", 0)  # not equal to "cpu", so the module is moved there and back

    def fill() -> None:
        with moved(module, elsewhere):
            raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(ResourceError, match="--device cpu"):
        fill()
    assert module.weight.device == CPU


@pytest.mark.parametrize(
    ("there", "products"),
    [
        ({"avx512_vnni": True, "avx512_bf16": False}, (True, False)),
        ({"avx512_vnni": False, "avx512_bf16": True}, (False, True)),
        ({"amx_int8": True, "amx_bf16": True, "cpu_name": "avx512_vnni"}, (True, True)),
        ({"architecture": "aarch64"}, (False, False)),
    ],
)
def test_products_are_those_of_the_processors_instructions(
    there: dict[str, object], products: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    device._instructions.cache_clear()
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: there, raising=False)
    try:
        assert (multiplies_int8(), multiplies_bfloat16()) == products
    finally:
        device._instructions.cache_clear()
