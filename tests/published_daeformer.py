"""What the published Embedded-ViT programs build beside what they run: 74 to 77 % of their parameters."""

from __future__ import annotations

from torch import nn

from nnslim.network.daeformer import FORMS, CrossBlock, DAEFormer, DualBlock, MixFFN, Stage


def add_what_is_never_run(network: DAEFormer, name: str) -> DAEFormer:
    """Register the layers that the published forward pass skips, in place.

    These are the two spare norms of every feed-forward part; of the coarsest decoder level, which is called without a
    skip, all but its expansion; and in the smaller forms the third encoder stage.
    """
    form = FORMS[name]
    full = FORMS["full" + ("" if form.grouped else "-dense")].dims
    scale = full[0] // form.dims[0]
    width, third = form.dims[-1], full[2] // scale
    network.decoder.unused = nn.ModuleDict(
        {
            "linear": nn.Linear(256 if width == 320 else width, width),
            "cross": CrossBlock(width, grouped=form.grouped),
            "merge": nn.Linear(2 * width, width),
            "blocks": nn.ModuleList(DualBlock(width, grouped=form.grouped) for _ in range(2)),
        }
    )
    if len(form.dims) == 2:
        blocks = form.blocks[-1]
        network.unused_stage = Stage(width, third, blocks, kernel=3, stride=2, grouped=form.grouped)
    for part in [module for module in network.modules() if isinstance(module, MixFFN)]:
        hidden = part.fc1.out_features
        part.spare2, part.spare3 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
    return network
