"""The one executor: walks this rank's list of actions and does what each says.

It decides nothing.  The order comes from the schedule, the SENDs and RECVs from its lowering; gradient accumulation on
one stage is the program F0 BW0 F1 BW1 ….  Between actions it keeps, per chunk and microbatch, only

    the chunk's input        a leaf whose gradient goes to the chunk before
    the gradient edge        where the backward pass enters; the output itself may be freed once it is sent
    weight-gradient work     what B left for W

Receives do not block: a RECV directly behind a computation is posted before it, so that the message travels meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.profiler import record_function

from engine.distributed.collectives import DONE, Work
from engine.model.context import Batch, Batches
from engine.model.objective import Head, Measure
from engine.model.transformer import Transformer
from engine.parallel.gradients import WeightGradQueue
from engine.parallel.pipeline.p2p import Messenger
from engine.schedules.action import Action, Kind

Key = tuple[int, int]                      # chunk, microbatch


class Executor:
    """Runs programs over this rank's chunks."""

    def __init__(self, chunks: Mapping[int, Transformer], placement: Sequence[int], messenger: Messenger,
                 weight_grads: WeightGradQueue, head: Head | None) -> None:
        """`chunks`: by global chunk index; `placement`: the stage of every chunk; `head`: that of the last chunk."""
        self.chunks, self.placement, self.messenger = chunks, placement, messenger
        self.weight_grads, self.head = weight_grads, head
        self.last_chunk = len(placement) - 1
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward, Kind.B: self._backward_input, Kind.W: self._backward_weight,
            Kind.BW: self._backward, Kind.SEND_F: self._send, Kind.SEND_B: self._send,
            Kind.RECV_F: self._receive_forward, Kind.RECV_B: self._receive_backward,
            Kind.REDUCE_GRAD: self._reduce_grad,
        }
        self.peak_in_flight = 0      # activations held at once in the latest step: (chunk, microbatch), F to W
        self._labels: dict[Action, str] = {}
        self._scale: Tensor | None = None
        self._reset([], None)

    def _reset(self, batches: Sequence[Batch], measure: Measure | None) -> None:
        self._batches = batches if isinstance(batches, Batches) else Batches(batches)
        self._measure = measure
        self._arrived: dict[Key, tuple[Tensor, Work]] = {}        # inputs of F
        self._grads: dict[Key, tuple[Tensor, Work]] = {}          # gradients of outputs, for B
        self._outgoing: dict[Key, Tensor] = {}                    # to be sent
        self._inputs: dict[Key, Tensor] = {}
        self._edges: dict[Key, GradientEdge] = {}
        self._weight_work: dict[Key, list[Callable[[], None]]] = {}
        self._measured: list[Tensor] = []

    def run(self, program: Sequence[Action], batches: Sequence[Batch], measure: Measure,
            scale: float | Tensor) -> Tensor | None:
        """Executes one step.

        Args:
            program: this rank's actions, receives hoisted (`hoist_receives`).
            batches: the microbatches, by number.
            measure: what the last chunk makes of its hidden states; the first tensor it returns is differentiated.
            scale: that one is multiplied by it before; 1 / number of tokens of the step, say.

        Returns:
            What was measured of each microbatch, detached, [microbatches, tensors, …], on ranks that hold the last
            chunk; None elsewhere.  Numbers of tokens [S, B] of a shorter microbatch have zeros behind them.
        """
        self._reset(batches, measure)
        # Filled in on the device: a number that is copied there would make the host wait for all that was started.
        self._scale = scale if isinstance(scale, Tensor) else \
            torch.full((), scale, dtype=torch.float32, device=self.messenger.device)
        if self.head is not None:
            self.head.scale = self._scale if torch.is_grad_enabled() else None
        self.peak_in_flight = 0
        for action in program:
            with record_function(self._label(action)):
                self._do[action.kind](action)
        self.messenger.wait_sent()
        measured = _stacked(self._measured) if self._measured else None
        self._reset([], None)
        return measured

    def _label(self, action: Action) -> str:
        """Its printed name, made once: programs are the same in every step."""
        if action not in self._labels:
            self._labels[action] = str(action)
        return self._labels[action]

    def _forward(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        batch = self._batches[action.microbatch]
        if action.chunk == 0:
            x = batch.tokens_SB
        else:
            x, work = self._arrived.pop(key)
            work.wait()
            x.requires_grad_(torch.is_grad_enabled())
        out = self.chunks[action.chunk].hidden_states(x, batch)
        if action.chunk == self.last_chunk:
            assert self._measure is not None and self.head is not None
            measured = self._measure(out, self.head, batch)
            self._measured.append(torch.stack([each.detach() for each in measured]))
            out = measured[0]
        else:
            self._hand_over(self._arrived, action, action.chunk + 1, out.detach())
        if torch.is_grad_enabled():
            self._inputs[key] = x
            if out.requires_grad:                    # else nothing in front of here is trained
                self._edges[key] = get_gradient_edge(out)
            self.peak_in_flight = max(self.peak_in_flight, len(self._inputs))

    def _backward(self, action: Action) -> None:
        self._backward_input(action, defer=False)
        self._backward_weight(action)

    def _backward_input(self, action: Action, defer: bool = True) -> None:
        key = (action.chunk, action.microbatch)
        if action.chunk == self.last_chunk:
            grad = self._scale
        else:
            grad, work = self._grads.pop(key)
            work.wait()
        if defer:
            self.weight_grads.open()
        if key in self._edges:
            torch.autograd.backward(self._edges.pop(key), grad)
        if defer:
            self._weight_work[key] = self.weight_grads.close()
        if action.chunk > 0:
            x = self._inputs[key]
            assert x.grad is not None
            self._hand_over(self._grads, action, action.chunk - 1, x.grad)
            x.grad = None          # x stays until W; its gradient only until it is sent

    def _backward_weight(self, action: Action) -> None:
        key = (action.chunk, action.microbatch)
        with torch.no_grad():      # a backward pass has no history; here, outside of autograd's, it would be recorded
            for compute in self._weight_work.pop(key, ()):
                compute()
        del self._inputs[key]

    def _hand_over(self, local: dict[Key, tuple[Tensor, Work]], action: Action, chunk: int, tensor: Tensor) -> None:
        """To the neighbouring chunk: directly if it is on this rank, else by the SEND that follows."""
        if chunk in self.chunks:
            local[chunk, action.microbatch] = tensor, DONE
        else:
            self._outgoing[action.chunk, action.microbatch] = tensor

    def _send(self, action: Action) -> None:
        tensor = self._outgoing.pop((action.chunk, action.microbatch))
        self.messenger.send(action, tensor, self.placement[action.partner.chunk])

    def _receive_forward(self, action: Action) -> None:
        self._arrived[action.chunk, action.microbatch] = self._receive(action)

    def _receive_backward(self, action: Action) -> None:
        self._grads[action.chunk, action.microbatch] = self._receive(action)

    def _receive(self, action: Action) -> tuple[Tensor, Work]:
        shape = self._batches.shape(action.microbatch)
        return self.messenger.receive(action, self.placement[action.partner.chunk], shape)

    def _reduce_grad(self, action: Action) -> None:
        """Nothing to start: a chunk's last contribution has set its buckets off (`engine.parallel.data.buckets`)."""


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    longest = max(part.shape[1] for part in parts) if parts[0].dim() > 1 else 0
    return torch.stack([F.pad(part, (0, 0, 0, longest - part.shape[1])) if part.dim() == 3 else part for part in parts])


def forward_only(program: Sequence[Action]) -> tuple[Action, ...]:
    """The part of a program that evaluation needs."""
    return tuple(action for action in program if action.kind in (Kind.F, Kind.SEND_F, Kind.RECV_F))
