import pytest
import torch
from threadpoolctl import threadpool_info

from grating_core.models.placement import choose_device, choose_dtype, thread_advice

CPU = torch.device("cpu")


def test_the_best_device_is_taken_unless_one_is_named() -> None:
    assert choose_device("cpu") == CPU == choose_device(CPU)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device(None).type == best


@pytest.mark.parametrize("device", ["gpu", "xpu", "", "cuda:99"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device='{device}'"):
        choose_device(device)


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch, has: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    chosen, reason = choose_dtype("auto", CPU)
    assert chosen == expected
    assert "bfloat16" in reason


def test_a_dtype_may_be_named_or_given() -> None:
    assert choose_dtype("float32", CPU)[0] == torch.float32 == choose_dtype(torch.float32, CPU)[0]
    for wrong in ("int4", "float64", torch.int16, torch.float64):
        with pytest.raises(ValueError, match="dtype="):
            choose_dtype(wrong, CPU)


def test_spinning_threads_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    gnu = any(pool["prefix"] == "libgomp" for pool in threadpool_info())
    assert ("OMP_WAIT_POLICY=PASSIVE" in (thread_advice() or "")) == gnu
    with monkeypatch.context() as one:
        one.setattr(torch, "get_num_threads", lambda: 1)
        assert thread_advice() is None
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert thread_advice() is None
