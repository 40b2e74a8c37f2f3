"""Compiles the fused kernel as a GPU's driver would get it; none is needed: `python -m tests.search.compiled`."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from knnmoe_hf.search.fused import FUSED_GROUP
from knnmoe_hf.search.triton_search import _CHUNK, _GROUPS, _group_minima

SIZES = {"WIDTH": 48, "CHUNK": _CHUNK, "GROUP": FUSED_GROUP, "GROUPS": _GROUPS}
ALIGNED = {(place,): [["tt.divisibility", 16]] for place in range(4)}  # as torch allocates


def compiled(dtype: str, generation: int) -> str:
    """PTX for keys of a dtype."""
    signature = {"asked": "*fp32", "codes": f"*{dtype}", "half_norms": "*fp32", "minima": "*i64", "groups": "i32"}
    source = ASTSource(_group_minima, signature | dict.fromkeys(SIZES, "constexpr"), constexprs=SIZES, attrs=ALIGNED)
    code = compile(source, target=GPUTarget("cuda", generation, 32)).asm
    assert code["cubin"]
    return code["ptx"]


if __name__ == "__main__":
    for generation in (80, 90):
        for dtype in ("i8", "bf16", "fp16", "fp32"):
            ptx = compiled(dtype, generation)
            assert "ld.global.v4.b32" in ptx and "ld.global.b8" not in ptx
    print("compiled")
