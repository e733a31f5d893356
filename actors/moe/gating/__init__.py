"""Which experts a token goes to, with what weight. Small parts, put together by `build_gate`:

    x_TD -> context attention (S4) -> projection -> noise (S3) -> temperature (S2) -> scores -> choice (S5, S6, S15)
         -> adaptive number of experts (S9) -> weights -> expert dropout (S10)

Scores are differentiable, the choice is not: gradients reach the gate through the weights and the balance losses.
Letters beside those of `actors.moe`: H width of the gate's attention, G groups or nodes, M of them a token may visit.
"""

from actors.moe.gating.contract import Gate, GateContext, GateOutput, GatePast
from actors.moe.gating.gates import ComposedGate, build_gate
from actors.moe.gating.shared import shared_share
from actors.moe.settings import GateSettings

__all__ = [
    "ComposedGate",
    "Gate",
    "GateContext",
    "GateOutput",
    "GatePast",
    "GateSettings",
    "build_gate",
    "shared_share",
]
