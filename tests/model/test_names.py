"""Names of weights in a table that is read in both directions."""

import pytest
import torch

from stoker.config import UserError
from stoker.model.names import Row, Table

TABLE = Table((
    Row("embedding.weight", "embed_tokens.weight"),
    Row("blocks.*.q.*", "layers.*.self_attn.q_proj.*"),
    Row("blocks.*.experts.*.up.*", "layers.*.mlp.experts.*.up_proj.*", transposed=True),
), unused=("layers.*.rotary.inv_freq",))
PAIRS = [
    ("embedding.weight", "embed_tokens.weight", False), ("blocks.11.q.bias", "layers.11.self_attn.q_proj.bias", False),
    ("blocks.0.q.weight", "layers.0.self_attn.q_proj.weight", False),
    ("blocks.2.experts.13.up.weight", "layers.2.mlp.experts.13.up_proj.weight", True),
]


@pytest.mark.parametrize("ours, theirs, transposed", PAIRS)
def test_both_directions(ours: str, theirs: str, transposed: bool) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    other = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]) if transposed else matrix
    name, tensor = TABLE.to_theirs(ours, matrix)
    assert name == theirs and torch.equal(tensor, other)
    back = TABLE.to_ours(theirs, other)
    assert back and back[0] == ours and torch.equal(back[1], matrix)
    assert TABLE.to_theirs(ours, torch.ones(3))[1].shape == (3,)


def test_what_the_table_does_not_have() -> None:
    assert TABLE.to_ours("layers.3.rotary.inv_freq", torch.ones(2)) is None
    for name in ("layers.x.y.self_attn.q_proj.weight", "my.embed_tokens.weight", "embed_tokensxweight",
                 "embedding.weight"):
        with pytest.raises(UserError, match=rf"^{name} is \(2,\) there and has no counterpart here"):
            TABLE.to_ours(name, torch.ones(2))
    with pytest.raises(ValueError, match="no row of the table of names has our blocks.0.k.weight: add one"):
        TABLE.to_theirs("blocks.0.k.weight", torch.ones(2))


def test_a_whole_model() -> None:
    ours = {ours: torch.rand(2, 3) for ours, _, _ in PAIRS}
    theirs = dict(TABLE.to_theirs(name, tensor) for name, tensor in ours.items())
    found = TABLE.converted(theirs | {"layers.0.rotary.inv_freq": torch.ones(2)}, ours, "the folder")
    assert found.keys() == ours.keys() and all(torch.equal(found[name], tensor) for name, tensor in ours.items())
    refused = {
        r"embed_tokens.weight is missing there and \(2, 3\) here, and so for 1 of 4": {
            name: t for name, t in theirs.items() if "embed" not in name},
        r"more.weight is \(1,\) there and missing here, and so for 1 of 5": theirs | {"more.weight": torch.ones(1)},
        r"up_proj.weight is \(2, 3\) there and \(3, 2\) here": theirs | {PAIRS[3][1]: torch.ones(2, 3)}}
    for why, changed in refused.items():
        with pytest.raises(UserError, match=f"^the folder does not fit: .*{why}"):
            TABLE.converted(changed, ours, "the folder")
