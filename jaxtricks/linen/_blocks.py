"""Blocks whose branches train in parallel and deploy as one convolution, for linen.

The blocks of `jt.nnx`, built from the same tables (`_block_tables`): variables have the same
paths and the functions are the same.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import _block_tables, _dtypes, _layer_functions, _layers, reparam
from jaxtricks._block_tables import BlockGeometry, BranchSpec, PointwiseSpec
from jaxtricks._layer_functions import BranchNodes, Padding, Pads
from jaxtricks._layers import Factory
from jaxtricks._typing import Array
from jaxtricks.linen._layers import (
    Sizes,
    Variables,
    conv_node,
    frozen_norm,
    is_standardized,
)
from jaxtricks.linen._variables import at_path, bound_variables
from jaxtricks.reparam._nodes import zero_pad

# Branches.


class _Part(nn.Module):
    """Something of a block that ends in a normalization, or in online mode in a gain.

    Attributes:
      block: geometry of the block.
      conv: factory of convolutions.
      norm: factory of normalizations.
      is_online: whether the branches are merged in every step.
    """

    block: BlockGeometry
    conv: Factory
    norm: Factory
    is_online: bool

    def affine_node(self, variables: Variables) -> reparam.Norm | reparam.Scale:
        """Return what stands behind the convolution as a node."""
        if self.is_online:
            return reparam.Scale(variables["params"]["gain"])
        return frozen_norm(self.norm(parent=None), at_path(variables, "norm"))

    def _gain(self, features: int, initial: float) -> None:
        init = nn.initializers.constant(initial)
        self.param("gain", init, (features,), jnp.float32)


class PointwiseNorm(_Part):
    """1x1 convolution and normalization in front of the kernel of a branch.

    The output is padded with its value on zero input, as in nnx.
    """

    spec: PointwiseSpec

    @nn.compact
    def __call__(self, x: Array, pads: Pads, flags: dict[str, bool]) -> Array:
        """Return the normalized conv(x), padded; in online mode only padded."""
        # Online this runs while initializing alone, for the sake of the parameters.
        y = self.conv_layer(name="conv")(x)
        if self.is_online:
            self._gain(self.spec.features, 1.0)
            return zero_pad(y, pads)
        if self.spec.residual:
            y = y + x.astype(y.dtype)
        # The border is of the statistics after this step, as in nnx.
        norm = self.norm(name="norm")
        y = norm(y, **flags)
        frozen = frozen_norm(norm, bound_variables(norm))
        return _layer_functions.pad_with_zero_response(y, pads, frozen)

    def conv_layer(self, **how: Any) -> Any:
        """Return the convolution; `how` says where it belongs."""
        if self.spec.residual:
            how["kernel_init"] = nn.initializers.zeros
        return self.conv(
            self.spec.features,
            self.block.ones,
            padding="VALID",
            feature_group_count=self.block.groups,
            use_bias=False,
            **how,
        )


class ConvNorm(_Part):
    """A branch: a convolution without bias, or a pooling, or nothing; then a norm."""

    spec: BranchSpec

    @nn.compact
    def __call__(self, x: Array, pads: Pads, flags: dict[str, bool]) -> Any:
        """Return norm(conv(x)), with x padded by `pads`; in online mode the nodes."""
        # Only the kernels are needed: the block convolves once, with their sum.
        if self.is_online:
            if self.is_initializing():
                self._initialize(x, pads)
            return self.nodes(bound_variables(self))
        x = self._padded(x, pads, flags)
        if self.spec.kind == "conv":
            x = self.conv_layer(name="conv")(x)
        elif self.spec.kind == "pool":
            block = self.block
            x = _layers.average_pool(
                x, block.kernel_size, block.strides, block.dilation
            )
        norm = self.norm
        if self.spec.scale != 1.0:
            init = nn.initializers.constant(self.spec.scale)
            return norm(name="norm", scale_init=init)(x, **flags)
        return norm(name="norm")(x, **flags)

    def _padded(self, x: Array, pads: Pads, flags: dict[str, bool]) -> Array:
        if self.spec.first is None:
            return zero_pad(x, pads)
        return self.pointwise(name="first")(x, pads, flags)

    def _initialize(self, x: Array, pads: Pads) -> None:
        """Create the parameters; in online mode no convolution is called later."""
        x = self._padded(x, pads, {})
        if self.spec.kind == "conv":
            self.conv_layer(name="conv")(x)
        self._gain(self.block.out_features, self.spec.initial_gain)

    def conv_layer(self, **how: Any) -> Any:
        """Return the convolution; `how` says where it belongs."""
        block = self.block
        return self.conv(
            block.out_features,
            self.spec.size,
            strides=block.strides,
            padding="VALID",  # its input is padded already
            kernel_dilation=tuple(
                d * self.spec.dilation for d in block.dilation
            ),
            feature_group_count=block.groups,
            use_bias=False,
            **how,
        )

    def pointwise(self, **how: Any) -> PointwiseNorm:
        """Return what stands in front of the kernel; `how` says where it belongs."""
        first: Any = self.spec.first
        return PointwiseNorm(
            self.block, self.conv, self.norm, self.is_online, spec=first, **how
        )

    def nodes(self, variables: Variables) -> BranchNodes:
        """Return the parts of the branch as nodes.

        Args:
          variables: of this branch.
        """
        linear = None
        if self.spec.kind == "conv":
            conv = self.conv_layer(parent=None)
            linear = conv_node(
                conv, at_path(variables, "conv"), self.spec.dilation
            )
        elif self.spec.kind == "pool":
            linear = reparam.AvgPool(self.block.kernel_size)
        affine = self.affine_node(variables)
        if self.spec.first is None:
            return BranchNodes(linear, affine)
        first, first_variables = (
            self.pointwise(parent=None),
            at_path(variables, "first"),
        )
        return BranchNodes(
            linear,
            affine,
            conv_node(
                first.conv_layer(parent=None), at_path(first_variables, "conv")
            ),
            first.affine_node(first_variables),
            self.spec.first.residual,
        )


# Blocks.


class ReparamBlock(nn.Module):
    """A sum of branches that share one window, on whose centre tap each is placed.

    See `jt.nnx.ACBlock` for the modes. Subclasses say in `table` which branches.
    """

    features: int
    kernel_size: Sizes = (3, 3)
    strides: Sizes | None = 1
    padding: Padding = "SAME"
    kernel_dilation: Sizes | None = 1
    feature_group_count: int | None = 1
    conv: Factory = nn.Conv
    norm: Factory = nn.BatchNorm
    mode: str = "branches"
    use_running_average: bool | None = None

    least_axes = 1  # not annotated: a constant of the class, not a field

    def geometry(self, in_features: int) -> BlockGeometry:
        """Return what all branches share, for an input with so many channels."""
        _block_tables.check_mode(type(self).__name__, self.mode)
        return _layer_functions.block_geometry(
            type(self).__name__,
            in_features,
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            groups=self.feature_group_count or in_features,
            least_axes=self.least_axes,
        )

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the block's table, the one with the largest kernel first."""
        raise NotImplementedError

    def branch(
        self, spec: BranchSpec, block: BlockGeometry, **how: Any
    ) -> ConvNorm:
        """Return the branch of one row; `how` says where it belongs."""
        is_online = self.mode == "online"
        return ConvNorm(
            block, self.conv, self.norm, is_online, spec=spec, **how
        )

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None
    ) -> Array:
        """Map [..., *spatial, in_features] to [..., *spatial', features].

        Args:
          x: the input.
          use_running_average: overrides the setting of the block for this call.
        """
        block = self.geometry(x.shape[-1])
        # With None each normalization keeps to its attribute.
        setting = use_running_average
        setting = self.use_running_average if setting is None else setting
        flags = {} if setting is None else {"use_running_average": setting}
        outputs = []
        for spec in self.table(block):
            branch = self.branch(spec, block, name=spec.name)
            pads = _layer_functions.branch_pads(
                x, self.padding, block, spec.extent
            )
            outputs.append(branch(x, pads, flags))
        if self.mode == "online":
            y = self._one_convolution(x, outputs, block)
            return self.norm(name="norm")(y, **flags)
        return functools.reduce(operator.add, outputs)

    def _one_convolution(
        self, x: Array, branches: Sequence[BranchNodes], block: BlockGeometry
    ) -> Array:
        first = self.table(block)[0]
        # The bound layers were never called: an unbound one has the settings.
        conv = self.branch(first, block, parent=None).conv_layer(parent=None)
        kernel = bound_variables(self)["params"][first.name]["conv"]["kernel"]
        return _layer_functions.one_convolution(
            x,
            branches,
            block,
            padding=self.padding,
            dtype=_dtypes.common_dtype(x, kernel, override=conv.dtype),
            precision=conv.precision,
        )

    def branch_nodes(
        self, variables: Variables, block: BlockGeometry
    ) -> list[BranchNodes]:
        """Return the branches of an unbound block as nodes.

        Args:
          variables: of the block.
          block: its geometry.
        """
        return [
            self.branch(spec, block, parent=None).nodes(
                at_path(variables, spec.name)
            )
            for spec in self.table(block)
        ]

    def norm_node(self, variables: Variables) -> reparam.Norm | None:
        """Return the normalization behind the sum as a node; None in mode "branches"."""
        if self.mode != "online":
            return None
        return frozen_norm(self.norm(parent=None), at_path(variables, "norm"))

    def started_from(
        self,
        variables: Variables,
        block: BlockGeometry,
        kernel: Array,
        bias: Array | None,
    ) -> dict[str, Any]:
        """Return variables with which the block computes conv(x, kernel) + bias.

        See `jt.nnx.ACBlock.start_from`.

        Args:
          variables: of the block, initialized.
          block: its geometry.
          kernel: [*kernel_size, in / groups, out].
          bias: [out] or None.

        Raises:
          ValueError: standardized kernels, or normalizations without scale or bias.
        """
        table = self.table(block)
        name = f"{type(self).__name__}.start_from"
        if is_standardized(
            self.branch(table[0], block, parent=None).conv_layer(parent=None)
        ):
            raise ValueError(f"{name}: {_layer_functions.STANDARDIZED_START}")
        # An unbound module: layers are built for their settings alone.
        branches = self.branch_nodes(variables, block)
        norm = self.norm_node(variables)
        norms = (
            [branch.affine for branch in branches] if norm is None else [norm]
        )
        base, _ = _layers.unwrap_partial(self.norm)
        norm_name = getattr(base, "__name__", "normalization")
        _layer_functions.check_startable(name, [(norm_name, n) for n in norms])
        branches, norm = _layer_functions.start_from_convolution(
            branches, norm, kernel, bias, block
        )
        # The caller's dictionaries stay as they are.
        params = _copied_tree(variables["params"])
        statistics = _copied_tree(variables["batch_stats"])
        params[table[0].name]["conv"]["kernel"] = branches[0].linear.kernel
        if norm is not None:
            _write_norm(norm, params, statistics)
            return {"params": params, "batch_stats": statistics}
        for spec, branch in zip(table, branches, strict=True):
            branch_params, branch_statistics = (
                params[spec.name],
                statistics[spec.name],
            )
            _write_norm(branch.affine, branch_params, branch_statistics)
            if spec.first is not None:
                _write_norm(
                    branch.first_affine,
                    branch_params["first"],
                    branch_statistics["first"],
                )
        return {"params": params, "batch_stats": statistics}


def _copied_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copied_tree(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
    }


def _write_norm(
    node: reparam.Norm, params: dict[str, Any], statistics: dict[str, Any]
) -> None:
    params["norm"] = {"scale": node.scale, "bias": node.bias}
    statistics["norm"] = {"mean": node.mean, "var": node.var}


class ACBlock(ReparamBlock):
    """KxK, Kx1 and 1xK branches, each normalized, summed; see `jt.nnx.ACBlock`.

    Attributes:
      features: channels of the output.
      kernel_size: (kh, kw) or (kd, kh, kw).
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: nn.Conv, this library's WSConv, or a partial of either.
      norm: nn.BatchNorm, this library's ExtendedBatchNorm, or a partial of either.
      mode: "branches", or "online" for one convolution per step.
      use_running_average: True in evaluation; None = as the normalizations say.
      gamma_init: initial scale of the normalizations (online: of the gains).

    Example:
      >>> import jax
      >>> block = ACBlock(8, (3, 3), use_running_average=True)
      >>> variables = jax.eval_shape(block.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> sorted(variables["params"])
      ['horizontal', 'square', 'vertical']
    """

    gamma_init: float = 1.0

    least_axes = 2

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the whole kernel and of one line along each axis."""
        return _block_tables.asymmetric_branches(
            block, gamma_init=self.gamma_init
        )


class RepVGGBlock(ReparamBlock):
    """KxK, 1x1 and identity branches, each normalized, summed; see `jt.nnx.RepVGGBlock`.

    The attributes are those of `ACBlock`, without `gamma_init`; `kernel_size` may be an
    int for one spatial axis.

    Example:
      >>> import jax
      >>> block, x = RepVGGBlock(4, use_running_average=True), jnp.ones((1, 6, 6, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['identity', 'point', 'square']
    """

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the KxK, 1x1 and, where it fits, identity branch."""
        return _block_tables.repvgg_branches(block)


class DiverseBranchBlock(ReparamBlock):
    """KxK, 1x1, 1x1-average and 1x1-KxK branches, summed; see `jt.nnx.DiverseBranchBlock`.

    The other attributes are those of `ACBlock`, without `gamma_init`.

    Attributes:
      internal_features: channels between 1x1 and KxK; None = as many as the input has,
        depthwise twice that.

    Example:
      >>> import jax
      >>> block, x = DiverseBranchBlock(4, use_running_average=True), jnp.ones((1, 6, 6, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['point', 'pool', 'sequence', 'square']
    """

    internal_features: int | None = None

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the KxK, 1x1 (if any), average and 1x1-KxK branch."""
        return _block_tables.diverse_branches(
            block, internal_features=self.internal_features
        )


class MobileOneBlock(ReparamBlock):
    """Several KxK branches, a 1x1 branch and the identity, summed; see `jt.nnx.MobileOneBlock`.

    The other attributes are those of `ACBlock`, without `gamma_init`.

    Attributes:
      num_branches: number of KxK branches.

    Example:
      >>> import jax
      >>> block, x = MobileOneBlock(4, num_branches=2, use_running_average=True), jnp.ones((1, 6, 6, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['identity', 'point', 'square_0', 'square_1']
    """

    num_branches: int = 4

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the KxK branches, and of the 1x1 and identity branch if any."""
        return _block_tables.mobileone_branches(
            block, num_branches=self.num_branches
        )


class DilatedReparamBlock(ReparamBlock):
    """A large kernel and dilated small ones, summed; see `jt.nnx.DilatedReparamBlock`.

    The other attributes are those of `ACBlock`, without `gamma_init`.

    Attributes:
      feature_group_count: groups; None = depthwise, as many as input channels.
      kernel_sizes: of the small kernels; None = the paper's for 5, 7, 9, 11, 13, 15 and
        17.
      dilates: their dilations; None = the paper's.

    Example:
      >>> import jax
      >>> block, x = DilatedReparamBlock(4, (7, 7), use_running_average=True), jnp.ones((1, 9, 9, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['dilated_0', 'dilated_1', 'dilated_2', 'large']
    """

    feature_group_count: int | None = None
    kernel_sizes: Sequence[int] | None = None
    dilates: Sequence[int] | None = None

    def table(self, block: BlockGeometry) -> _block_tables.Table:
        """Return the rows of the large and the dilated branches."""
        return _block_tables.dilated_branches(
            block, kernel_sizes=self.kernel_sizes, dilates=self.dilates
        )
