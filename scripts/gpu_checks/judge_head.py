"""The judge's verdict is a difference of two logits: what the output layer's dtype does to it.

At logits near 20, bfloat16 has steps of 0.125, so that near-even pairs come out exactly even.
"""

import torch
import torch.nn.functional as F  # noqa: N812

from gpu_checks.checking import Report, error, free, peak_bytes, seconds

LOGIT = 20.0  # how large the logits of a sure model are
MARGIN = 0.05  # nats: the standard deviation of a near-even pair's margin
FLOAT32_ERROR = 1e-3
"""Nats. A float32 product of H = 6144 terms is wrong by about √H · 6e-8 · LOGIT = 1e-4; ten times that is refused."""
CHUNKED_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Relative norm of a gradient. The reference is float32; in bfloat16 the tiles' logits have been rounded to 2⁻⁹."""


def check(report: Report) -> None:
    """Compares the margins of near-even pairs, then TRL's chunked log-probabilities with those of whole logits."""
    device = report.device
    pairs, hidden, vocabulary = (256, 256, 1024) if report.small else (4096, 6144, 32768)
    random = torch.Generator(device).manual_seed(0)
    h = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=device).normal_(generator=random)
    head = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=random)
    margins(report, h, head, random)
    free(device)
    chunked(report, h, head, random)


def margins(report: Report, h: torch.Tensor, head: torch.Tensor, random: torch.Generator) -> None:
    """The two verdict tokens' logits are near `LOGIT` and differ by a normal margin of `MARGIN` nats."""
    head = head.clone()
    direction = torch.empty(h.shape[1], device=h.device).normal_(generator=random)
    direction /= direction.norm()
    # Rows 0 and 1 read the same direction, so that both logits are large, and a little of their own.
    own = torch.empty(2, h.shape[1], device=h.device).normal_(0, MARGIN / (2 * h.shape[1]) ** 0.5, generator=random)
    head[:2] = (direction + own).to(head.dtype)
    h = (h.float() + (LOGIT - h.float() @ direction)[:, None] * direction).to(h.dtype)
    exact = h.double() @ head[:2].double().T
    exact_margin = exact[:, 0] - exact[:, 1]
    for dtype in (torch.bfloat16, torch.float32):
        weight = head[:2].to(dtype)
        logits = (h.to(dtype) @ weight.T).float()
        margin = logits[:, 0] - logits[:, 1]
        wrong = float((margin - exact_margin).abs().max())
        report.row(
            what="margin",
            dtype=str(dtype).removeprefix("torch."),
            exactly_even=float((margin == 0).double().mean()),
            exactly_even_in_float64=float((exact_margin == 0).double().mean()),
            largest_error_nats=wrong,
            mean_logit=float(logits.mean()),
        )
        if dtype == torch.float32:
            report.at_most("the float32 head's error in nats", wrong, FLOAT32_ERROR)
        else:
            report.expect(wrong > FLOAT32_ERROR, "a bfloat16 head is as exact as float32, so this check tests nothing")


def chunked(report: Report, h: torch.Tensor, head: torch.Tensor, random: torch.Generator) -> None:
    """TRL computes the log-probabilities of the labels tile by tile, without whole logits."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as missing:
        report.skipped["chunked"] = str(missing)
        return
    device = h.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    labels = torch.randint(len(head), (len(h),), generator=random, device=device)
    hidden, weight = h.to(dtype).requires_grad_(), head.to(dtype)

    def theirs() -> torch.Tensor:
        # The arguments of TRL 1.16, `trl/trainer/utils.py`: no bias, temperature 1, tiles of 32768 columns.
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]

    def plain() -> torch.Tensor:
        return F.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])[:, 0]

    exact_hidden = h.float().requires_grad_()
    exact = F.log_softmax(exact_hidden @ head.float().T, -1).gather(1, labels[:, None])[:, 0]
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_hidden)
    exact = exact.detach()
    for name, compute in (("chunked", theirs), ("whole", plain)):
        found = compute()
        (grad,) = torch.autograd.grad(found.sum(), hidden)
        largest, relative = float((found.detach() - exact).abs().max()), error(grad, exact_grad)

        def step(compute: "object" = compute) -> None:
            torch.autograd.grad(compute().sum(), hidden)  # type: ignore[operator]

        report.row(
            what=name, dtype=str(dtype).removeprefix("torch."), largest_error_nats=largest, gradient_error=relative,
            step_s=seconds(step, device, rounds=3), peak_bytes=peak_bytes(step, device),
        )  # fmt: skip
        if name == "chunked":
            # One step of a logit's rounding: logits are near 3 here, where bfloat16 has steps of 2⁻⁶.
            report.at_most("TRL's largest error in nats", largest, 2**-5 if dtype == torch.bfloat16 else 1e-4)
            report.at_most("TRL's gradient's error", relative, CHUNKED_ERROR[dtype])
