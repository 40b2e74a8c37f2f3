"""Compiles the fused kernel as a driver would get it, without a GPU: `python -m tests.search.compiled_kernel`."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from knnmoe_hf.search.cuda import _CHUNK, _GROUPS, _group_minima
from knnmoe_hf.search.exact import FUSED_GROUP

SIZES = {"WIDTH": 48, "CHUNK": _CHUNK, "GROUP": FUSED_GROUP, "GROUPS": _GROUPS}
ALIGNED = {(place,): [["tt.divisibility", 16]] for place in range(4)}  # as torch allocates


def ptx(dtype: str, generation: int) -> str:
    """For keys of a dtype."""
    signature = {"scaled": "*fp32", "codes": f"*{dtype}", "half_norms": "*fp32", "minima": "*i64", "groups": "i32"}
    source = ASTSource(_group_minima, signature | dict.fromkeys(SIZES, "constexpr"), constexprs=SIZES, attrs=ALIGNED)
    code = compile(source, target=GPUTarget("cuda", generation, 32)).asm
    assert code["cubin"]
    return code["ptx"]


if __name__ == "__main__":
    for generation in (80, 90):
        for dtype in ("i8", "bf16", "fp16", "fp32"):
            code = ptx(dtype, generation)
            assert "ld.global.v4.b32" in code and "ld.global.b8" not in code
    print("compiled")
