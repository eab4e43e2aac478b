"""The output head and the loss, in chunks of trained tokens.

Stands for `qlora_core.train.loss.SupervisedLoss`, where the backward pass over a chunk follows its forward pass at once.
"""

from __future__ import annotations

from qlora_core.estimate.architecture import HEAD
from qlora_core.estimate.decoder import Decoder
from qlora_core.estimate.operations import FLOAT32, INT64, activate, cast, gather, part, scale
from qlora_core.estimate.products import adapted, plain
from qlora_core.estimate.tape import Arrived, Gradients, Node, Tape, Value

_CHUNK_ELEMENTS = 2**25
_CHUNK_TOKENS = 1024


def forward_and_backward(decoder: Decoder, tape: Tape) -> None:
    """Run a whole pass: the decoder, the loss of its trained tokens, and all the way back."""
    # Ids and positions of the tokens; places and targets of the trained ones.
    batch = tape.memory(INT64 * (2 * decoder.rows.tokens + 2 * decoder.rows.trained))
    last = _loss(decoder, tape)
    tape.run_backward(last, [tape.memory(FLOAT32)])
    del batch


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens' logits are there at once."""
    return max(1, min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocabulary))


def _loss(decoder: Decoder, tape: Tape) -> Node:
    hidden = decoder.forward(tape)
    trained, width = decoder.rows.trained, decoder.model.hidden
    picked = gather(tape, hidden, trained, width)
    found = [tape.memory(picked.nbytes)]
    sums = [tape.memory(elements * FLOAT32) for elements in _trained_of_head(decoder)]
    losses = tape.memory(trained * FLOAT32)
    _one_chunk(decoder, tape, min(trained, chunk_tokens(decoder.model.vocabulary)))

    def backward(_: Arrived) -> Gradients:
        sums.clear()
        return [found.pop()]

    loss = tape.record(tape.memory(FLOAT32), 1, FLOAT32, [picked], backward, trains=True)
    del losses, hidden
    return loss.maker


def _trained_of_head(decoder: Decoder) -> list[int]:
    """Elements of what is trained of the head."""
    if decoder.adapter.head:
        return [decoder.model.head.elements]
    rank = decoder.adapter.ranks.get(HEAD)
    if rank is None:
        return []
    return [rank * decoder.model.hidden, rank * decoder.model.vocabulary]


def _one_chunk(decoder: Decoder, tape: Tape, tokens: int) -> None:
    chunk_tape = Tape(tape.ledger, on_host=tape.on_host)
    elements = tokens * decoder.model.hidden
    start = Node((), (), lambda _: ())
    chunk = Value(tape.memory(0), elements, decoder.itemsize, start)
    last = _chunk_loss(decoder, chunk_tape, chunk, tokens)
    chunk_tape.run_backward(last, [tape.memory(FLOAT32)], start)


def _chunk_loss(decoder: Decoder, tape: Tape, chunk: Value, tokens: int) -> Node:
    logits = _logits(decoder, tape, chunk)
    exact = cast(tape, logits, FLOAT32)
    likelihoods = activate(tape, exact, keeps_result=True)
    del exact
    nbytes = likelihoods.nbytes
    losses = tape.record(
        tape.memory(tokens * FLOAT32), tokens, FLOAT32, [likelihoods],
        lambda _: [tape.memory(nbytes)], saved=[likelihoods.memory],
    )  # fmt: skip
    return losses.maker


def _logits(decoder: Decoder, tape: Tape, chunk: Value) -> Value:
    family, head = decoder.model.family, decoder.model.head
    rank = decoder.adapter.ranks.get(HEAD)
    if decoder.adapter.head:
        logits = _trained_head(decoder, tape, chunk)
    elif rank is not None:
        logits = adapted(tape, chunk, head, rank, decoder.products, quantized=False)
    else:
        logits = plain(tape, chunk, head)
    if family.scaled_logits:
        logits = scale(tape, logits)
    if family.capped_logits:
        logits = scale(tape, logits)
        logits = activate(tape, logits, keeps_result=True)
        logits = scale(tape, logits)
    # The shell's answer has a dimension more, whose gradient is put into zeros.
    return part(tape, logits, logits.elements)


def _trained_head(decoder: Decoder, tape: Tape, chunk: Value) -> Value:
    """A head that is trained whole: its matrix, kept in float32, is rounded for each chunk, and so is its gradient."""
    matrix, size = decoder.model.head.elements, decoder.itemsize
    rounded = [tape.memory(matrix * size)] if size != FLOAT32 else []
    result, nbytes = chunk.elements // decoder.model.hidden * decoder.model.vocabulary, chunk.nbytes

    def backward(_: Arrived) -> Gradients:
        of_x = tape.memory(nbytes)
        of_matrix = tape.memory(matrix * size)
        if size != FLOAT32:
            of_matrix = tape.memory(matrix * FLOAT32)
        del of_matrix
        return [of_x]

    memory = tape.memory(result * size)
    return tape.record(memory, result, size, [chunk], backward, saved=rounded)
