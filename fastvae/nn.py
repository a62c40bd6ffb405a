"""Modules over the ops: parameters and one op call each. Sequences are time-major, [T, B, ·].

Weights and biases are initialized as U(−0.1, 0.1), norm weights as 1, norm biases as 0. One-hot
inputs are given as token ids and looked up instead of multiplied. Semeniuta et al. 2017,
arXiv:1702.02390.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import ops
from fastvae.distributed import AcrossProcesses, combine_statistics
from fastvae.ops.checks import check_lengths
from fastvae.ops.linear import mark_unknown
from fastvae.ops.precision import accumulate_dtype
from fastvae.scalars import is_whole, plain

NO_TORCHSCRIPT = "torch.jit.{} does not work here: use torch.export or torch.compile"


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors -> the same in autocast's dtype if autocast is on; float64 tensors stay as they are.

    An op takes tensors of one dtype.

    Args:
        tensors: floating-point tensors or None; at least one tensor, whose device decides.

    Returns:
        the tensors in their order, None where None was given.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def upcast(x: Tensor) -> Tensor:
    """x -> x in its accumulation dtype: float32, or float64 for float64."""
    return x.to(accumulate_dtype(x.dtype))


def input_embeddings(weight: Tensor, bias: Tensor, count: int) -> Tensor:
    """weight [N, I], bias [N] -> [count, N]: what each one-hot input adds to a layer, upcast.

    Args:
        weight: weight of the layer, [N, I]; its last `count` columns belong to the one-hot inputs.
        bias: bias of the layer, [N], added to every row.
        count: number of one-hot inputs.

    Returns:
        a row per one-hot input, [count, N], in the accumulation dtype.
    """
    return upcast(weight[:, weight.shape[1] - count :]).T + upcast(bias)


class NoTorchScript:
    """Mixin of modules that TorchScript cannot run: one clear line instead of its own errors."""

    def __prepare_scriptable__(self):
        """Called by `torch.jit.script`. Raises RuntimeError."""
        raise RuntimeError(NO_TORCHSCRIPT.format("script"))


class _Uniform:
    """The paper's initialization for torch's layers."""

    def reset_parameters(self) -> None:
        """Initialize all parameters as U(−0.1, 0.1)."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -0.1, 0.1)


def _check_sizes(**sizes: int) -> None:
    """Raise ValueError naming a size that is no whole number from 1 on."""
    for name, size in sizes.items():
        if not is_whole(size) or size < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {size!r}")


class Linear(NoTorchScript, _Uniform, nn.Linear):
    """`torch.nn.Linear`, initialized as in the paper; takes one-hot inputs as token ids too."""

    def forward(self, x: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """x [..., K], tokens [...] -> [..., N]; equation: `fastvae.ops.linear`.

        Args:
            x: dense inputs, [..., K], or None.
            tokens: ids of one-hot inputs, [...] int64, or None. They belong to the last in_features
                − K columns of the weight.

        Returns:
            the layer's output, [..., N].

        Raises:
            RuntimeError: an input has a wrong shape, dtype or device, or an id is out of range.
        """
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        return ops.linear(*cast(x, self.weight, bias), tokens)


class StridedConv(NoTorchScript, _Uniform, nn.Conv1d):
    """Convolution that halves a sequence: x [2T, B, C] -> [T, B, N], initialized as in the paper.

    `torch.nn.Conv1d` of kernel 3, stride 2 and padding 1, with its parameters; takes one-hot inputs
    as token ids too.

    Args:
        in_channels: C.
        out_channels: N.
        device: where parameters are created.
        dtype: of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, *, device=None, dtype=None) -> None:
        super().__init__(in_channels, out_channels, 3, 2, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """x [2T, B, C] or tokens [2T, B] -> [T, B, N].

        Args:
            x: dense inputs, [2T, B, C], or None.
            tokens: ids of one-hot inputs, [2T, B] int64, or None.

        Returns:
            the layer's output, [T, B, N].

        Raises:
            ValueError: not exactly one of x and tokens is given, or it has another shape.
            IndexError: an id is out of range; on a GPU its outputs are NaN instead.
        """
        if (x is None) == (tokens is None):
            raise ValueError("either x or tokens must be given")
        if tokens is not None:
            return self._sum_rows(tokens)
        if x.dim() != 3 or x.shape[0] % 2 or x.shape[2] != self.in_channels:
            raise ValueError(f"x must have shape [2T, B, {self.in_channels}], got {list(x.shape)}")
        if x.device.type != "cpu":
            return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)
        x, weight, bias = cast(x, self.weight, self.bias)
        return ops.linear(ops.unfold(x).flatten(2), weight.flatten(1), bias)

    def _sum_rows(self, tokens: Tensor) -> Tensor:
        """tokens [2T, B] -> [T, B, N]: sums of the weight's rows, by lookup."""
        if tokens.dim() != 2 or tokens.shape[0] % 2:
            raise ValueError(f"tokens must have shape [2T, B], got {list(tokens.shape)}")
        V = self.in_channels
        # [3, V + 1, N]: each tap's rows, then zeros for the position before the sequence.
        table = F.pad(upcast(self.weight).permute(2, 1, 0), (0, 0, 0, 1))
        if tokens.device.type != "cpu":  # the CPU raises; on others a wrong id would abort
            tokens = mark_unknown(tokens, V)
            table = F.pad(table, (0, 0, 0, 1), value=float("nan"))
        tokens = tokens + (tokens == V)  # a wrong id too: V is the position before the sequence
        windows = F.pad(tokens, (0, 0, 1, 0), value=V).unfold(0, 3, 2)
        y = self.bias + sum(map(F.embedding, windows.unbind(-1), table.unbind()))
        return cast(y.to(self.weight.dtype))[0]


class StridedConvTranspose(NoTorchScript, _Uniform, nn.ConvTranspose1d):
    """Convolution that doubles a sequence: x [T, B, C] -> [2T, B, N], initialized as in the paper.

    `torch.nn.ConvTranspose1d` of kernel 3, stride 2, padding 1 and output padding 1, with its
    parameters.

    Args:
        in_channels: C.
        out_channels: N.
        device: where parameters are created.
        dtype: of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, *, device=None, dtype=None) -> None:
        super().__init__(in_channels, out_channels, 3, 2, 1, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, C] -> [2T, B, N]. Raises ValueError where x has another shape."""
        if x.dim() != 3 or x.shape[2] != self.in_channels:
            raise ValueError(f"x must have shape [T, B, {self.in_channels}], got {list(x.shape)}")
        if x.device.type != "cpu":
            return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)
        x, weight, bias = cast(x, self.weight, self.bias)
        windows = ops.linear(x, weight.flatten(1).T, weight.new_zeros(weight[0].numel()))
        return ops.fold(windows.unflatten(2, (-1, 3)), bias)


class _Composite(NoTorchScript, nn.Module):
    """A module without parameters of its own."""

    def reset_parameters(self) -> None:
        """Initialize the parameters of all submodules again."""
        for module in self.modules():
            if not isinstance(module, _Composite) and hasattr(module, "reset_parameters"):
                module.reset_parameters()


class BatchNorm(NoTorchScript, AcrossProcesses, nn.BatchNorm1d):
    """Batch norm: x [N, C] or [B, C, T] -> the same shape; eps 1e-4, momentum 0.1.

    `set_process_group` makes it use the batch of all processes, with any backend;
    `torch.nn.SyncBatchNorm` rejects CPU tensors.

    Args:
        channels: C.
        device: where parameters are created.
        dtype: of the parameters.
    """

    def __init__(self, channels: int, *, device=None, dtype=None) -> None:
        super().__init__(channels, eps=1e-4, momentum=0.1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] or [B, C, T] -> the same shape, by batch or (eval mode) running statistics."""
        if self.process_group is None or not self.training:
            return super().forward(x)
        a, over = upcast(x), [0, *range(2, x.dim())]
        var, mean = torch.var_mean(a, over, correction=0)
        count = x.numel() // x.shape[1]
        mean, scale, shift = self.from_statistics(count, mean, var * count)
        shape = (-1, *[1] * (x.dim() - 2))
        y = (a - mean.view(shape)) * scale.view(shape) + shift.view(shape)
        return y.to(x.dtype)

    @property
    def by_batch(self) -> bool:
        """Whether `forward` uses the batch's statistics: in training mode, or without others."""
        return self.training or self.running_mean is None

    def from_statistics(
        self, count: int, mean: Tensor, m2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of a batch -> mean, scale, shift [C].

        The norm is then (a − mean) · scale + shift. In training mode the running statistics are
        updated, if there are any.

        Args:
            count: values per channel in this process.
            mean: their mean, [C], in the accumulation dtype.
            m2: Σ (a − mean)², [C], in the accumulation dtype.

        Returns:
            mean, scale and shift of the batch of all processes, [C] each, in the accumulation
            dtype.

        Raises:
            ValueError: this process is alone and has less than two values per channel.
        """
        group = self.process_group if self.training else None
        if count < 2 and group is None:
            raise ValueError("batch statistics need more than 1 value per channel: use eval mode")
        total, mean, m2 = combine_statistics(count, mean, m2, group)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._track(mean.detach(), m2.detach() / (total - 1))
        return mean, *self._scale_and_shift(m2 / total)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """A batch's mean, variance [C] -> into the running ones, as `torch.nn.BatchNorm1d` does."""
        batches, rate = self.num_batches_tracked, self.momentum
        if batches is not None:
            batches.add_(1)
        if rate is None:  # the mean of all batches
            rate = 0.0 if batches is None else 1 / batches.to(mean.dtype)
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(upcast(running).lerp(now, rate))

    def _scale_and_shift(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Variance [C] -> what a deviation from the mean is multiplied by, what is added then."""
        scale = torch.rsqrt(variance + self.eps)
        shift = torch.zeros_like(scale) if self.bias is None else upcast(self.bias)
        return scale if self.weight is None else upcast(self.weight) * scale, shift

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """weight [C, ...], bias [C] of the layer before -> both with the running norm folded in.

        Args:
            weight: weight of the layer, [C, ...].
            bias: bias of the layer, [C].

        Returns:
            the folded weight and bias, in the dtypes of `weight` and `bias`.

        Raises:
            ValueError: there are no running statistics.
        """
        if self.running_mean is None:
            raise ValueError(
                "a batch norm without running statistics cannot be folded into a layer, as "
                "generation does"
            )
        scale, shift = self._scale_and_shift(upcast(self.running_var))
        folded = upcast(weight) * scale.view(-1, *[1] * (weight.dim() - 1))
        shifted = (upcast(bias) - self.running_mean) * scale + shift
        return folded.to(weight.dtype), shifted.to(bias.dtype)


def _norm_rows(norm: BatchNorm, x: Tensor) -> Tensor:
    """x [T, B, C] -> the same shape, normalized over T and B."""
    return norm(x.flatten(0, 1)).view_as(x)


def set_process_group(model: nn.Module, group) -> None:
    """Compute batch statistics and free bits over all processes of a group.

    `fastvae.train` calls it. In your own training loop, call it with
    `torch.distributed.group.WORLD` before you wrap a model in `DistributedDataParallel`, which
    averages only gradients.

    Args:
        model: changed in place, with all its submodules that have such statistics.
        group: a process group, or None for each process alone.
    """
    for module in model.modules():
        if isinstance(module, AcrossProcesses):
            module.process_group = group


class LayerNormLSTM(NoTorchScript, nn.Module):
    """LSTM with one joint layer norm over its four gates: x [T, B, I] -> y [T, B, H].

    Equation: `fastvae.ops.layer_norm_lstm`. The gates are in the order i, f, g, o. Parameters:
    weight_ih [4H, I], weight_hh [4H, H], bias [4H], norm_weight [4H], norm_bias [4H]. Semeniuta et
    al. 2017, arXiv:1702.02390.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: must be 1; like the arguments up to `proj_size`, it exists so that the layer can
            replace `torch.nn.LSTM`.
        bias: must be True.
        batch_first: x and y are [B, T, ·].
        dropout: must be 0.
        bidirectional: must be False.
        proj_size: must be 0.
        eps: added to the norm's variance.
        device: where parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: a size is below 1, or an argument of `torch.nn.LSTM` has an unsupported value;
            the message names an alternative.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        eps: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _refuse_lstm_arguments(num_layers, bias, dropout, bidirectional, proj_size)
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        if not isinstance(batch_first, bool):
            raise ValueError(f"batch_first must be True or False, got {batch_first!r}")
        self.input_size, self.hidden_size, self.eps = plain((input_size, hidden_size, eps))
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be 0 or more, and finite, got {eps}")
        self.batch_first = batch_first
        rows, factory_kwargs = 4 * hidden_size, {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **factory_kwargs))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, **factory_kwargs))
        self.bias = nn.Parameter(torch.empty(rows, **factory_kwargs))
        self.norm_weight = nn.Parameter(torch.empty(rows, **factory_kwargs))
        self.norm_bias = nn.Parameter(torch.empty(rows, **factory_kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weights and bias as U(−0.1, 0.1), the norm's weight as 1 and its bias as 0."""
        for parameter in (self.weight_ih, self.weight_hh, self.bias):
            nn.init.uniform_(parameter, -0.1, 0.1)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        first = ", batch_first=True" if self.batch_first else ""
        return f"{self.input_size}, {self.hidden_size}, eps={self.eps}{first}"

    def forward(
        self,
        x: Tensor | None,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        tokens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [T, B, K], (h0, c0) [B, H] -> y [T, B, H], (h_n, c_n) [B, H].

        `lengths` stands for `torch.nn.utils.rnn.pack_padded_sequence`: the output is zero after a
        sequence's end, and its last state is that of its last step. Sequences may be in any order.
        A CPU skips the steps after a sequence's end, but for the product with weight_ih; packed
        inputs, the `data` of a PackedSequence, skip that too.

        Args:
            x: dense inputs, [T, B, K], or None; [B, T, K] with `batch_first`. With lengths also
                packed, [N, K].
            state: (h0, c0), [B, H] each; None is zeros.
            tokens: ids of one-hot inputs, [T, B] int64 ([B, T] with `batch_first`; packed, [N]), or
                None. They belong to the last I − K columns of weight_ih.
            lengths: steps of each sequence, from 0 to T, [B] int64, on the device of x, or None.
                For packed inputs they must not increase, and N is their sum.

        Returns:
            h of every step, [T, B, H] ([B, T, H] with `batch_first`; packed, [N, H]), and the last
            h and c, [B, H] each, without the layer dimension of `torch.nn.LSTM`. A sequence of no
            steps ends with the state that it started with.

        Raises:
            ValueError: x, a state or lengths have a wrong shape, lengths another dtype, device or
                value, x is a PackedSequence, or both inputs are None.
            RuntimeError: an input has a wrong dtype or device, or an id is out of range.
        """
        packed = self._check(x, state, tokens, lengths)
        if self.batch_first and not packed:
            x = None if x is None else x.transpose(0, 1)
            tokens = None if tokens is None else tokens.T
        if lengths is not None and not packed:  # whatever is after a sequence's end
            like = tokens.unsqueeze(2) if x is None else x
            check_lengths(lengths, like, like)
            real = _real_steps(like, lengths)
            x = None if x is None else torch.where(real.unsqueeze(2), x, 0)
            tokens = None if tokens is None else torch.where(real, tokens, 0)
        a = ops.linear(*cast(x, self.weight_ih, self.bias), tokens)
        if state is None:
            zeros = a.new_zeros(len(lengths) if packed else a.shape[1], self.hidden_size)
            state = zeros, zeros
        weight_hh, gain, bias, h0, c0 = cast(
            self.weight_hh, self.norm_weight, self.norm_bias, *state
        )
        y, c_n = ops.layer_norm_lstm(a, weight_hh, gain, bias, h0, c0, self.eps, lengths)
        h_n = y[-1] if lengths is None else _last_rows(y, h0, lengths)
        return y.transpose(0, 1) if self.batch_first and not packed else y, (h_n, c_n)

    def _check(self, x, state, tokens, lengths) -> bool:
        """Raise ValueError for inputs and states of wrong shapes -> whether inputs are packed."""
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise ValueError(
                "x is a PackedSequence: pad it with torch.nn.utils.rnn.pad_packed_sequence, which "
                "gives lengths too, and pass these as lengths="
            )
        if state is not None and not (
            isinstance(state, tuple | list)
            and len(state) == 2
            and all(isinstance(t, Tensor) for t in state)
        ):
            raise ValueError("state must be a pair (h0, c0) of tensors [B, H]")
        like = x if tokens is None else tokens
        if like is None:
            raise ValueError("x or tokens must be given")
        packed = False
        if lengths is not None:
            if not isinstance(lengths, Tensor) or lengths.dim() != 1:
                raise ValueError("lengths must be a tensor [B]")
            packed = like.dim() == (2 if tokens is None else 1)
        rows = "[B, T" if self.batch_first else "[T, B"
        if x is not None and x.dim() != (2 if packed else 3):
            hint = f": for one sequence give x.unsqueeze({0 if self.batch_first else 1})"
            raise ValueError(
                f"x must have shape {rows}, I], got {list(x.shape)}{hint if x.dim() == 2 else ''}"
            )
        if tokens is not None and tokens.dim() != (1 if packed else 2):
            raise ValueError(f"tokens must have shape {rows}], got {list(tokens.shape)}")
        if tokens is not None and x is not None and tokens.shape != x.shape[:-1]:
            raise ValueError(
                f"tokens must have shape {list(x.shape[:-1])} beside x, got {list(tokens.shape)}"
            )
        if packed:
            steps, batch = len(like), len(lengths)
        else:
            steps, batch = like.shape[:2] if not self.batch_first else like.shape[1::-1]
        if not steps and not packed:
            raise ValueError(
                f"x must have at least one step, got {list(like.shape)} for {rows}, ..]"
            )
        for name, t in zip(("h0", "c0"), state or (), strict=False):
            if tuple(t.shape) != (batch, self.hidden_size):
                hint = f": give {name}.squeeze(0)" if t.dim() == 3 and t.shape[0] == 1 else ""
                raise ValueError(
                    f"{name} must have shape [B, H] = [{batch}, {self.hidden_size}], "
                    f"got {list(t.shape)}{hint}"
                )
        return packed


def _real_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """x [T, B, ...], lengths [B] -> [T, B] bool: which steps are before a sequence's end."""
    return torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths


def _last_rows(y: Tensor, h0: Tensor, lengths: Tensor) -> Tensor:
    """y [T, B, H] or packed [N, H], h0 [B, H], lengths [B] -> h of each last step [B, H]."""
    if not len(y):  # the sum, 0, keeps the parameters in the graph
        return h0 + y.sum()
    sequence, last = torch.arange(len(lengths), device=y.device), lengths - 1
    if y.dim() == 3:
        rows = y[last.clamp(0, len(y) - 1), sequence]
    else:  # before it stand all rows of earlier steps, and at its step those of longer sequences
        before = torch.minimum(lengths, last.unsqueeze(1)).sum(1)
        rows = y[(before + sequence).clamp(0, len(y) - 1)]
    return torch.where((lengths > 0).unsqueeze(1), rows, h0)


def _refuse_lstm_arguments(num_layers, bias, dropout, bidirectional, proj_size) -> None:
    """Raise ValueError for arguments that `torch.nn.LSTM` supports and `LayerNormLSTM` does not."""
    if num_layers != 1:
        raise ValueError(
            f"num_layers must be 1, got {num_layers}: stack layers in a torch.nn.ModuleList"
        )
    if not bias:
        raise ValueError("bias must be True: set layer.bias to zeros and freeze it instead")
    if dropout:
        raise ValueError(
            f"dropout must be 0, got {dropout}: put a torch.nn.Dropout between your layers"
        )
    if bidirectional:
        raise ValueError(
            "bidirectional must be False: run a second layer on x.flip(0) and join the outputs"
        )
    if proj_size:
        raise ValueError(f"proj_size must be 0, got {proj_size}: put a torch.nn.Linear behind")


class HighwayConv(NoTorchScript, nn.Module):
    """Highway masked convolution of kernel size 2 with batch norm: x [T, B, C] -> [T, B, C].

    Equation: `fastvae.ops.highway_conv`. Parameters: weight [3C, C, 2], bias [3C] and those of
    `norm`, a `BatchNorm`, whose mode decides between the batch's statistics and the running ones.
    It is a part of the op: it is not called, and neither are its hooks. Semeniuta et al. 2017,
    arXiv:1702.02390.

    Args:
        channels: C.
        carry: whether the input passes through the carry gate.
        device: where parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: channels is below 1.
    """

    def __init__(self, channels: int, *, carry: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        self.channels, self.carry = channels, carry
        factory_kwargs = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(3 * channels, channels, 2, **factory_kwargs))
        self.bias = nn.Parameter(torch.empty(3 * channels, **factory_kwargs))
        self.norm = BatchNorm(3 * channels, **factory_kwargs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize weight and bias as U(−0.1, 0.1), and the norm."""
        nn.init.uniform_(self.weight, -0.1, 0.1)
        nn.init.uniform_(self.bias, -0.1, 0.1)
        self.norm.reset_parameters()

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.channels}, carry={self.carry}"

    def folded(self) -> tuple[Tensor, Tensor]:
        """The convolution with the running norm folded in -> weight [3C, C, 2], bias [3C].

        Raises:
            ValueError: the norm has no running statistics.
            TypeError: `norm` was replaced by another kind of module.
        """
        self._check_norm()
        return self.norm.fold(self.weight, self.bias)

    def _check_norm(self) -> None:
        """Raise TypeError for a norm that cannot be a part of the op."""
        if not isinstance(self.norm, BatchNorm):
            raise TypeError(
                f"norm must be a fastvae.nn.BatchNorm, got {type(self.norm).__name__}; "
                "fastvae.nn.set_process_group normalizes over all processes"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, C] -> [T, B, C].

        Raises:
            TypeError: `norm` was replaced by another kind of module.
        """
        self._check_norm()
        if not self.norm.by_batch:
            return ops.highway_conv(*cast(x, *self.folded()), self.carry)
        x, weight, bias = cast(x, self.weight, self.bias)
        a, mean, m2 = ops.highway_conv_project(x, weight, bias)
        norm = self.norm.from_statistics(x.shape[0] * x.shape[1], mean, m2)
        return ops.highway_conv_gate(a, x, *norm, self.carry)


class HighwayConvStack(_Composite):
    """Several highway masked convolutions in sequence: x [T, B, C] -> [T, B, C].

    The stack is causal: output t depends on inputs t − layers to t.

    Args:
        channels: C.
        layers: number of convolutions.
        carry: as in `HighwayConv`.
        device: where parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: channels is below 1, or layers below 0.
    """

    def __init__(
        self, channels: int, layers: int, *, carry: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        if layers < 0:
            raise ValueError(f"layers must be 0 or more, got {layers}")
        self.channels = channels
        self.layers = nn.ModuleList(
            HighwayConv(channels, carry=carry, device=device, dtype=dtype) for _ in range(layers)
        )

    def folded(self) -> tuple[Tensor, Tensor]:
        """All N layers with their running norms folded in -> weight [N, 3C, C, 2], bias [N, 3C]."""
        if not self.layers:
            return torch.empty(0, 3 * self.channels, self.channels, 2), torch.empty(
                0, 3 * self.channels
            )
        weights, biases = zip(*(layer.folded() for layer in self.layers), strict=True)
        return torch.stack(weights), torch.stack(biases)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, C] -> [T, B, C]."""
        for layer in self.layers:
            x = layer(x)
        return x


class ConvEncoder(_Composite):
    """Convolutional encoder of the hybrid VAE: tokens [B, L] -> mean, log-variance [B, Z].

    Blocks of Conv1d (kernel 3, stride 2), batch norm and ReLU halve the length each; a linear layer
    follows. Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        vocab_size: V.
        length: L, divisible by 2 for each block.
        latent_size: Z.
        channels: output channels of each block.
        device: where parameters are created.
        dtype: of the parameters.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        latent_size: int,
        channels: Sequence[int],
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(
            StridedConv(before, after, **factory_kwargs)
            for before, after in pairwise((vocab_size, *channels))
        )
        self.norms = nn.ModuleList(BatchNorm(size, **factory_kwargs) for size in channels)
        flat = channels[-1] * (length >> len(channels))
        self.linear = Linear(flat, 2 * latent_size, **factory_kwargs)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] int64 -> mean, log-variance [B, Z]."""
        x = None
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = conv(None, tokens.T) if x is None else conv(x)
            x = _norm_rows(norm, y).relu()
        return self.linear(x.permute(1, 2, 0).flatten(1)).chunk(2, -1)


class DeconvDecoder(_Composite):
    """Deconvolutions of the hybrid VAE: z [B, Z] -> features [T, B, D].

    A linear layer and ReLU, then blocks of ConvTranspose1d (kernel 3, stride 2), batch norm and
    ReLU that double the length each. They mirror the encoder: from channels[-1] to channels[0],
    then D. Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        latent_size: Z.
        length: T, divisible by 2 for each block.
        channels: of the encoder's blocks.
        feature_channels: D.
        device: where parameters are created.
        dtype: of the parameters.
    """

    def __init__(
        self,
        latent_size: int,
        length: int,
        channels: Sequence[int],
        feature_channels: int,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.shape = channels[-1], length >> len(channels)
        sizes = (*reversed(channels), feature_channels)
        self.linear = Linear(latent_size, self.shape[0] * self.shape[1], **factory_kwargs)
        self.convs = nn.ModuleList(
            StridedConvTranspose(before, after, **factory_kwargs)
            for before, after in pairwise(sizes)
        )
        self.norms = nn.ModuleList(BatchNorm(size, **factory_kwargs) for size in sizes[1:])

    def forward(self, z: Tensor) -> Tensor:
        """z [B, Z] -> features [T, B, D]."""
        x = self.linear(z.to(self.linear.weight.dtype)).relu().unflatten(1, self.shape)
        x = x.permute(2, 0, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _norm_rows(norm, conv(x)).relu()
        return x
