"""Models whose weights were written by hand: an algorithm each, and what makes a search for it hard.

Each has neurons and heads that are active on every prompt and write to the stream (one follows the answer itself, one
raises all logits alike, which no softmax can see), dead neurons that point at the answer, and constant nodes that the
answer passes through, which no mean ablation can notice and which are in no key.
"""

import torch

from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.draft import Draft, bit, word_task


def quote() -> GroundTruth:
    """Two layers, no norm: a string is closed with the quote that opened it."""
    forms = [
        ("print ( $q $word $word1 $word2", "$q"),
        ("open ( $word = $q $word1 $word2", "$q"),
        ("$word = [ $q $word1 $word2", "$q"),
        ("$word , $word1 = $q $word2", "$q"),
    ]
    longer = [
        ("print ( $word , $word1 = [ $q $word2 $word3 $word4 $word5", "$q"),
        ("$word = open ( $q $word1 $word2 $word3 $word4", "$q"),
    ]
    task = word_task("quote", forms, longer, ({"q": '"'}, {"q": "'"}), {})
    stream = "one single double word_a word_b bracket is_quote type close topic echo decoy every hum idle spare"
    draft = Draft(task, stream.split(), n_layers=2, n_heads=2, d_head=2, d_mlp=10, norm="none", act_fn="relu")
    for token in draft.ids:
        draft.embed(token, one=1)
    draft.embed("'", single=1)
    draft.embed('"', double=1)
    for token, value in {"(": 1.0, "[": -1.0, "=": 0.5}.items():
        draft.embed(token, bracket=value)
    draft.embed_words("word_a", "word_b")
    draft.key(
        """
        0  mlp_read.single    -> neuron.0             1
        0  mlp_read.double    -> neuron.0             1
        0  mlp_read.double    -> neuron.1             1
        0  mlp_read.single    -> neuron.2             1
        0  neuron.0           -> mlp_write.is_quote   1
        0  neuron.1           -> mlp_write.type       1
        0  neuron.2           -> mlp_write.type      -1
        1  attn_read.is_quote -> k.0                  6
        1  attn_read.type     -> v.0                  1
        1  v.0                -> attn_write.close     1
        """
    )
    draft.unembed("close", {'"': 4, "'": -4}, key=True)
    draft.wires(QUOTE_BESIDE)
    draft.raise_all_alike("every", 1.5)
    draft.expect(-3, **{'"': 0, "'": 0})
    return draft.finished(
        "Layer 0 turns the two quote tokens into a mark (a quote stands here) and a type (+1 double, -1 single). In "
        "layer 1 every position attends to marked positions (its query is a constant) and reads the type there into "
        "`close`, which raises one quote and lowers the other."
    )


QUOTE_BESIDE = """
    0  1                  -> neuron.3             1
    0  neuron.3           -> mlp_write.hum        1
    1  attn_read.hum      -> q.0                  2

    0  1                  -> neuron.4            -9
    0  mlp_read.word_a    -> neuron.4             2
    0  neuron.4           -> mlp_write.type       3
    1  1                  -> neuron.2            -9
    1  mlp_read.echo      -> neuron.2             2
    1  neuron.2           -> mlp_write.close      3

    0  mlp_read.double    -> neuron.5             2
    0  neuron.5           -> mlp_write.decoy      1
    0  attn_read.one      -> q.0                  2
    0  attn_read.word_a   -> k.0                  3
    0  attn_read.word_b   -> v.0                  2
    0  v.0                -> attn_write.echo      1
    0  attn_read.word_b   -> q.2                  2
    0  attn_read.bracket  -> k.2                  3
    0  attn_read.word_a   -> v.2                  1
    0  attn_read.bracket  -> v.2                  1
    0  v.2                -> attn_write.topic     1
    0  mlp_read.word_a    -> neuron.6             2
    0  mlp_read.word_b    -> neuron.6             1
    0  neuron.6           -> mlp_write.topic      1
    0  mlp_read.echo      -> neuron.7             1
    0  neuron.7           -> mlp_write.every      1
    1  attn_read.topic    -> q.2                  2
    1  attn_read.echo     -> k.2                  2
    1  attn_read.decoy    -> v.2                  1
    1  v.2                -> attn_write.every     1
    1  mlp_read.close     -> neuron.0             1
    1  neuron.0           -> mlp_write.every      1
    1  mlp_read.topic     -> neuron.1             1
    1  neuron.1           -> mlp_write.decoy      1
"""
"""What else goes on in `quote`: a constant neuron that makes the query, two dead neurons that point at the answer, and
heads and neurons that carry words, brackets and even the quote to channels that no probability depends on."""


def mlp_gate() -> GroundTruth:
    """One layer with AbsTopK at one half: `yes` only after both `on` and `up`, by one neuron."""
    forms = [
        ("set $s $word go up $word1 $word2 :", "$a"),
        ("go up $word $word1 set $s $word2 :", "$a"),
        ("set on $word go $d $word1 $word2 :", "$a"),
        ("$word go $d set on $word1 $word2 :", "$a"),
    ]
    longer = [
        ("$word $word1 set on $word2 $word3 go $d $word4 $word5 :", "$a"),
        ("go up $word $word1 $word2 set $s $word3 $word4 :", "$a"),
    ]
    sides = ({"s": "on", "d": "up", "a": "yes"}, {"s": "off", "d": "down", "a": "no"})
    task = word_task("mlp_gate", forms, longer, sides, {})
    noise = [f"noise{i}" for i in range(8)]
    stream = ["is_switch", "switch", "is_way", "way", "at_switch", "at_way", "both", "idle", *noise]
    shape = {"n_layers": 1, "n_heads": 3, "d_head": 2, "d_mlp": 8}
    draft = Draft(task, stream, **shape, norm="none", act_fn="gelu", afrac=0.5)
    draws = torch.rand(len(draft.ids), len(noise), generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    for token, row in zip(draft.ids, draws.tolist(), strict=True):
        draft.embed(token, **dict(zip(noise, row, strict=True)))
    for token, value in {"on": 1, "off": -1}.items():
        draft.embed(token, is_switch=1, switch=value)
    for token, value in {"up": 1, "down": -1}.items():
        draft.embed(token, is_way=1, way=value)
    draft.key(
        """
        0  attn_read.is_switch -> k.0                   3
        0  attn_read.is_way    -> k.2                   3
        0  attn_read.switch    -> v.0                   2
        0  attn_read.way       -> v.2                   2
        0  v.0                 -> attn_write.at_switch  1
        0  v.2                 -> attn_write.at_way     1
        0  mlp_read.at_switch  -> neuron.0              2
        0  mlp_read.at_way     -> neuron.0              2
        0  neuron.0            -> mlp_write.both        1
        """
    )
    draft.unembed("both", {"yes": 2, "no": -2}, key=True)
    draft.wires("0 1 -> q.0 4 \n 0 1 -> q.2 4 \n 0 1 -> neuron.0 -4")
    draft.wires(MLP_GATE_BESIDE)
    draft.raise_all_alike("noise0", 1)
    draft.expect(-2, yes=-4, no=4)
    return draft.finished(
        "Two heads with constant queries fetch the state of the switch and the way (+2 or -2) from wherever they stand "
        "in the prompt. One neuron adds them up and fires only if both are positive; `yes` needs it."
    )


MLP_GATE_BESIDE = """
    0  attn_read.noise0    -> q.4                 2
    0  attn_read.noise1    -> q.5                 2
    0  attn_read.noise4    -> k.1                 1.5
    0  attn_read.noise5    -> k.3                 1.5
    0  attn_read.noise2    -> k.4                 2
    0  attn_read.noise3    -> k.5                 2
    0  attn_read.noise0    -> v.1                 1
    0  attn_read.noise6    -> v.4                 1
    0  attn_read.noise7    -> v.5                 1
    0  v.1                 -> attn_write.noise1   1
    0  v.4                 -> attn_write.noise2   1
    0  v.4                 -> attn_write.noise4  -0.7
    0  v.4                 -> attn_write.noise5   0.5
    0  v.5                 -> attn_write.noise3   1
    0  v.5                 -> attn_write.noise6  -0.8
    0  v.5                 -> attn_write.noise7   0.6
    0  mlp_read.noise1     -> neuron.1            1.2
    0  mlp_read.noise2     -> neuron.2            1.2
    0  mlp_read.noise3     -> neuron.3            1.2
    0  mlp_read.noise4     -> neuron.4            1.2
    0  mlp_read.noise5     -> neuron.5            1.2
    0  mlp_read.at_way     -> neuron.6            0.8
    0  1                   -> neuron.7           -9
    0  mlp_read.noise7     -> neuron.7            1
    0  neuron.1            -> mlp_write.noise0    1
    0  neuron.2            -> mlp_write.noise1    1
    0  neuron.2            -> mlp_write.noise2   -1
    0  neuron.3            -> mlp_write.noise3    1
    0  neuron.4            -> mlp_write.noise4    1
    0  neuron.4            -> mlp_write.noise0    0.5
    0  neuron.5            -> mlp_write.noise5    1
    0  neuron.5            -> mlp_write.noise6   -1
    0  neuron.6            -> mlp_write.noise7    1
    0  neuron.7            -> mlp_write.both      5
"""
"""What else goes on in `mlp_gate`: every token has eight noisy features, which compete for the places that AbsTopK
leaves at every site and always lose to the key; a neuron that follows one half of the answer; a dead one."""


def attention_copy() -> GroundTruth:
    """One layer, RMSNorm, attention both ways and no sink: the name in a sentence is said again."""
    forms = [
        ("$who went to $place with $word and $word1 :", "$who"),
        ("to $place with $word went $who and $word1 :", "$who"),
        ("$word and $word1 with $who went to $place :", "$who"),
    ]
    longer = [
        ("$word and $word1 with $word2 and $word3 went to $place with $who :", "$who"),
        ("to $place with $word and $who and $word1 went $word2 and $word3 :", "$who"),
    ]
    names, towns = ["ada", "bob", "cleo", "dan"], ["lima", "oslo", "rome", "york"]
    sides = ({"who": "$name"}, {"who": "$name1"})
    task = word_task("attention_copy", forms, longer, sides, {"name": names, "place": towns})
    stream = "anchor is_name bit_a bit_b copy_a copy_b is_place place_a here_a word_a word_b every mood idle spare"
    shape = {"n_layers": 1, "n_heads": 2, "d_head": 2, "d_mlp": 8, "act_fn": "relu"}
    draft = Draft(task, stream.split(), **shape, norm="rms", attention_dir="bidirectional", sink=False)
    draft.level_norms("anchor", ANCHOR)
    for i, name in enumerate(names):
        draft.embed(name, is_name=1, bit_a=bit(i, 0), bit_b=bit(i, 1))
    for i, town in enumerate(towns):
        draft.embed(town, is_place=1, place_a=bit(i, 0))
    draft.embed_words("word_a", "word_b")
    draft.key(
        """
        0  attn_read.is_name -> k.0                6
        0  attn_read.bit_a   -> v.0                1
        0  attn_read.bit_b   -> v.1                1
        0  v.0               -> attn_write.copy_a  1
        0  v.1               -> attn_write.copy_b  1
        """
    )
    for channel, place in (("copy_a", 0), ("copy_b", 1)):
        draft.unembed(channel, {name: 4 * bit(i, place) for i, name in enumerate(names)}, key=True)
    draft.wires(ATTENTION_COPY_BESIDE)
    draft.raise_all_alike("every", 1)
    return draft.finished(
        "Every position attends to the name (its query is a constant) and copies the two bits that tell four names "
        "apart; each name's logit is its agreement with both bits."
    )


ANCHOR = 256.0
"""The constant channel of models with norms: what the others add to the norm is below one part in a thousand."""

ATTENTION_COPY_BESIDE = """
    0  1                  -> q.0                 2
    0  1                  -> q.2                 2
    0  attn_read.word_a   -> q.3                 1
    0  attn_read.is_place -> k.2                 3
    0  attn_read.word_b   -> k.3                 1
    0  attn_read.place_a  -> v.2                 1
    0  attn_read.bit_a    -> v.3                 1
    0  attn_read.place_a  -> v.3                -0.7
    0  attn_read.word_a   -> v.3                 1
    0  v.2                -> attn_write.here_a   1
    0  v.3                -> attn_write.mood     1
    0  mlp_read.here_a    -> neuron.0            1
    0  mlp_read.copy_b    -> neuron.1            1
    0  mlp_read.word_a    -> neuron.2            1
    0  mlp_read.mood      -> neuron.3            1
    0  1                  -> neuron.4           -9
    0  mlp_read.bit_a     -> neuron.4            1
    0  1                  -> neuron.5            1
    0  neuron.0           -> mlp_write.every     1
    0  neuron.1           -> mlp_write.every    -1
    0  neuron.2           -> mlp_write.mood      1
    0  neuron.3           -> mlp_write.every     1
    0  neuron.4           -> mlp_write.copy_a    4
    0  neuron.5           -> mlp_write.idle      1
"""
"""What else goes on in `attention_copy`: a head that copies the place as this one copies the name, neurons that follow
place, words and even a bit of the answer into a channel that raises all logits alike, a dead one, a constant one."""


def induction() -> GroundTruth:
    """Two layers that need each other: after a key that was seen before comes what came after it then."""
    forms = [
        ("$word $key $val $word1 $word2 $key1 $val1 $word3 $ask", "$says"),
        ("$key $val $word $key1 $val1 $word1 $word2 $word3 $ask", "$says"),
        ("$word $word1 $word2 $key1 $val1 $key $val $word3 $ask", "$says"),
    ]
    longer = [
        ("$word $word1 $key $val $word2 $word3 $word4 $key1 $val1 $word5 $ask", "$says"),
        ("$word $key1 $val1 $word1 $word2 $key $val $word3 $word4 $word5 $word6 $ask", "$says"),
    ]
    keys, values = ["red", "blue", "green", "pink"], ["one", "two", "three", "four"]
    sides = ({"ask": "$key", "says": "$val"}, {"ask": "$key1", "says": "$val1"})
    task = word_task("induction", forms, longer, sides, {"key": keys, "val": values})
    stream = "key_a key_b val_a val_b prev_a prev_b copy_a copy_b word_a word_b topic every echo hum idle spare"
    shape = {"n_layers": 2, "n_heads": 2, "d_head": 2, "d_mlp": 8, "act_fn": "relu", "norm": "none"}
    draft = Draft(task, stream.split(), concatenated=("pos", "pos_squared"), **shape)
    steps = torch.arange(draft.model.cfg.n_ctx)
    assert draft.model.pos_embed is not None
    draft.model.pos_embed.W_pos.data[:] = torch.stack([steps / 8, steps**2 / 64], 1)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        draft.embed(key, key_a=bit(i, 0), key_b=bit(i, 1))
        draft.embed(value, val_a=bit(i, 0), val_b=bit(i, 1))
    draft.embed_words("word_a", "word_b")
    draft.key(INDUCTION)
    for channel, place in (("copy_a", 0), ("copy_b", 1)):
        draft.unembed(channel, {value: 4 * bit(i, place) for i, value in enumerate(values)}, key=True)
    draft.wires(INDUCTION_BESIDE)
    draft.raise_all_alike("every", 1)
    return draft.finished(
        "A head of layer 0 attends one position back (its score 10 (2 (p - 1) j - j^2) is largest at j = p - 1) and "
        "notes which key stood there. A head of layer 1 looks for the position whose note is the present key, and "
        "copies the two bits of the value that stands there."
    )


INDUCTION = """
    0  attn_read.pos         -> q.0                160
    0  attn_read.pos         -> k.0                11.3
    0  attn_read.pos_squared -> k.1                90.5
    0  attn_read.key_a       -> v.0                1
    0  attn_read.key_b       -> v.1                1
    0  v.0                   -> attn_write.prev_a  1
    0  v.1                   -> attn_write.prev_b  1
    1  attn_read.key_a       -> q.0                3
    1  attn_read.key_b       -> q.1                3
    1  attn_read.prev_a      -> k.0                3
    1  attn_read.prev_b      -> k.1                3
    1  attn_read.val_a       -> v.0                1
    1  attn_read.val_b       -> v.1                1
    1  v.0                   -> attn_write.copy_a  1
    1  v.1                   -> attn_write.copy_b  1
"""
"""With `pos` p / 8 and `pos_squared` p^2 / 64, and the biases below: q = 20 (p - 1), -10; k = sqrt(2) (j, j^2)."""

INDUCTION_BESIDE = """
    0  1                     -> q.0               -20
    0  1                     -> q.1               -10
    0  1                     -> q.2                2
    0  attn_read.word_a      -> k.2                3
    0  attn_read.word_b      -> v.2                1
    0  attn_read.key_a       -> v.2                1
    0  v.2                   -> attn_write.topic   1
    0  mlp_read.word_a       -> neuron.0           1
    0  mlp_read.topic        -> neuron.1           1
    0  mlp_read.val_a        -> neuron.2           1
    0  1                     -> neuron.3          -9
    0  mlp_read.word_b       -> neuron.3           1
    0  mlp_read.pos          -> neuron.4           1
    0  neuron.0              -> mlp_write.echo     1
    0  neuron.1              -> mlp_write.every    1
    0  neuron.2              -> mlp_write.echo     1
    0  neuron.3              -> mlp_write.prev_a   4
    0  neuron.4              -> mlp_write.every    1
    1  attn_read.topic       -> q.2                2
    1  attn_read.echo        -> k.2                1
    1  attn_read.val_b       -> v.2                1
    1  attn_read.topic       -> v.3                1
    1  v.2                   -> attn_write.every   1
    1  v.3                   -> attn_write.topic   1
    1  mlp_read.copy_a       -> neuron.0           1
    1  mlp_read.topic        -> neuron.1           1
    1  1                     -> neuron.2          -9
    1  mlp_read.echo         -> neuron.2           1
    1  neuron.0              -> mlp_write.every    1
    1  neuron.1              -> mlp_write.echo     1
    1  neuron.2              -> mlp_write.copy_b   4
"""
"""What else goes on in `induction`: heads and neurons that carry words, values, positions and a bit of the answer to
channels that no probability depends on, and two dead neurons that point at the key."""


def bracket_depth() -> GroundTruth:
    """Two layers: a list inside a list is closed twice, told by the average of brackets and the threshold of a sink."""
    forms = [
        ("$word = [ $word1 $b $word2 $word3 , $word4", "$end"),
        ("$word [ ] [ ] [ $word1 $b $word2 $word3", "$end"),
        ("$word ( [ $b $word1 ] [ $word2 , $word3", "$end"),
    ]
    longer = [
        ("$word $word1 = [ $word2 , $word3 $b $word4 , $word5 , $word6", "$end"),
        ("$word = [ $word1 ] $word2 [ $word3 $b $word4 , $word5 $word6", "$end"),
    ]
    task = word_task("bracket_depth", forms, longer, ({"b": "[", "end": "]]"}, {"b": ";", "end": "]"}), {})
    stream = "open close depth nested word_a word_b comma last topic echo every mood hum idle"
    draft = Draft(task, stream.split(), n_layers=2, n_heads=2, d_head=2, d_mlp=8, norm="none", act_fn="relu")
    draft.embed("[", open=1)
    draft.embed("]", close=1)
    for token, value in {",": 1.0, ";": -1.0, "=": 0.5, "(": -0.5}.items():
        draft.embed(token, comma=value)
    draft.embed_words("word_a", "word_b")
    draft.key(
        """
        0  attn_read.open   -> v.0               1
        0  attn_read.close  -> v.0              -1
        0  v.0              -> attn_write.depth  2
        1  attn_read.depth  -> q.0               56.5
        """
    )
    draft.key_nodes(1, "attn_write.nested")
    draft.unembed("nested", {"]]": 8, "]": -8}, key=True)
    draft.wires("1 1 -> q.0 -12.4 \n 1 1 -> k.0 4 \n 1 1 -> v.0 1 \n 1 v.0 -> attn_write.nested 1")
    draft.sinks(1, 2.5, 0)
    draft.wires(BRACKET_DEPTH_BESIDE)
    draft.raise_all_alike("every", 1)
    draft.expect(-3, **{"]": 4, "]]": -4})
    return draft.finished(
        "A head of layer 0 attends to all tokens alike and so averages +1 for `[` and -1 for `]` over the prompt. That "
        "average is the query of a head of layer 1 whose keys and values are constants: above the threshold, which "
        "the sink sets, the head writes 1, below it nothing. An average falls with the length of a prompt, so prompts "
        "of more than 17 tokens are closed once too rarely."
    )


BRACKET_DEPTH_BESIDE = """
    0  1                  -> q.2                 2
    0  1                  -> q.3                 1
    0  attn_read.open     -> k.2                 4
    0  attn_read.close    -> k.2                 4
    0  attn_read.word_a   -> k.3                 2
    0  attn_read.open     -> v.2                 1
    0  attn_read.close    -> v.2                -1
    0  attn_read.word_b   -> v.3                 1
    0  v.2                -> attn_write.last     1
    0  v.3                -> attn_write.topic    1
    0  mlp_read.depth     -> neuron.0            3
    0  mlp_read.word_a    -> neuron.1            1
    0  mlp_read.last      -> neuron.2            2
    0  1                  -> neuron.3           -9
    0  mlp_read.open      -> neuron.3            1
    0  1                  -> neuron.4            1
    0  mlp_read.comma     -> neuron.5            1
    0  neuron.0           -> mlp_write.every     1
    0  neuron.1           -> mlp_write.echo      1
    0  neuron.2           -> mlp_write.every     1
    0  neuron.3           -> mlp_write.depth     4
    0  neuron.4           -> mlp_write.hum       1
    0  neuron.5           -> mlp_write.mood      1
    1  attn_read.echo     -> q.2                 2
    1  attn_read.topic    -> k.2                 2
    1  attn_read.last     -> v.2                 1
    1  attn_read.open     -> v.3                 1
    1  v.2                -> attn_write.every    1
    1  v.3                -> attn_write.mood     1
    1  mlp_read.nested    -> neuron.0            1
    1  mlp_read.depth     -> neuron.1            5
    1  1                  -> neuron.2           -9
    1  mlp_read.depth     -> neuron.2            5
    1  neuron.0           -> mlp_write.every     2
    1  neuron.1           -> mlp_write.mood      1
    1  neuron.2           -> mlp_write.nested    5
"""
"""What else goes on in `bracket_depth`: a head that fetches the last bracket (right more often than not), neurons that
follow depth and answer into channels that no probability depends on, and two dead neurons that point at the key."""


def two_hop() -> GroundTruth:
    """Two layers, RMSNorm: the type of a variable is found through its name, where that was bound."""
    forms = [
        ("$name = set $word $name1 = str $word1 $word2 $ask", "$says"),
        ("$word $name1 = str $word1 $word2 $name = set $ask", "$says"),
        ("$name1 = str $name = set $word $word1 $word2 $ask", "$says"),
        ("$word $name = set $word1 $name1 = str $word2 $ask", "$says"),
    ]
    longer = [
        ("$word $name = set $word1 $word2 $word3 $name1 = str $word4 $word5 $ask", "$says"),
        ("$word $word1 $name1 = str $word2 $word3 $name = set $word4 $word5 $word6 $ask", "$says"),
    ]
    names = ["left", "right", "upper", "lower"]
    sides = ({"ask": "$name", "says": "add"}, {"ask": "$name1", "says": "join"})
    task = word_task("two_hop", forms, longer, sides, {"name": names})
    stream = "anchor is_name name_a name_b is_kind type of_a of_b found word_a word_b recent topic echo every idle"
    shape = {"n_layers": 2, "n_heads": 2, "d_head": 4, "d_mlp": 8, "act_fn": "relu", "norm": "rms"}
    draft = Draft(task, stream.split(), concatenated=("late", "early"), **shape)
    draft.level_norms("anchor", ANCHOR)
    angles = 0.04 * torch.arange(draft.model.cfg.n_ctx)
    assert draft.model.pos_embed is not None
    draft.model.pos_embed.W_pos.data[:] = torch.stack([angles.sin(), angles.cos()], 1)
    for i, name in enumerate(names):
        draft.embed(name, is_name=1, name_a=bit(i, 0), name_b=bit(i, 1))
    draft.embed("set", is_kind=1, type=1)
    draft.embed("str", is_kind=1, type=-1)
    draft.embed_words("word_a", "word_b")
    draft.key(TWO_HOP)
    draft.unembed("found", {"add": 5, "join": -5}, key=True)
    draft.wires("0 1 -> q.0 2 \n 1 1 -> q.2 6")
    draft.sinks(1, 33, 0)
    draft.wires(TWO_HOP_BESIDE)
    draft.raise_all_alike("every", 1)
    draft.expect(-3, add=0, join=0)
    return draft.finished(
        "A head of layer 0 attends to the latest name (a name outweighs every distance) and notes two bits of it, so "
        "that a type knows whose it is. A head of layer 1 compares the name at hand with the notes of all types; only "
        "a type with both bits right overcomes the sink, and is read into `found`."
    )


TWO_HOP = """
    0  attn_read.is_name -> k.0               70
    0  attn_read.late    -> k.0               80
    0  attn_read.name_a  -> v.0               1
    0  attn_read.name_b  -> v.1               1
    0  v.0               -> attn_write.of_a   1
    0  v.1               -> attn_write.of_b   1
    1  attn_read.name_a  -> q.0               6
    1  attn_read.name_b  -> q.1               6
    1  attn_read.of_a    -> k.0               3.4
    1  attn_read.of_b    -> k.1               3.4
    1  attn_read.is_kind -> k.2               6
    1  attn_read.type    -> v.0               1
    1  v.0               -> attn_write.found  1
"""
"""Scores of layer 1: 18 for a type, 10.2 for each bit that agrees (-10.2 if not); the sink stands at 33. Positions are
angles, `late` their sine, since a norm of their own would level anything else."""

TWO_HOP_BESIDE = """
    0  1                  -> q.4                 2
    0  attn_read.word_a   -> k.4                 3
    0  attn_read.word_b   -> v.4                 1
    0  attn_read.type     -> v.5                 2
    0  v.4                -> attn_write.topic    1
    0  v.5                -> attn_write.echo     1
    0  mlp_read.type      -> neuron.0            1
    0  mlp_read.of_a      -> neuron.1            1
    0  mlp_read.word_a    -> neuron.2            1
    0  1                  -> neuron.3           -9
    0  mlp_read.name_a    -> neuron.3            2
    0  mlp_read.late      -> neuron.4            1
    0  neuron.0           -> mlp_write.every     1
    0  neuron.1           -> mlp_write.every    -1
    0  neuron.2           -> mlp_write.echo      1
    0  neuron.3           -> mlp_write.of_a      4
    0  neuron.4           -> mlp_write.topic     1
    1  1                  -> q.4                 3
    1  attn_read.is_kind  -> k.4                 6
    1  attn_read.late     -> k.4                 20
    1  attn_read.topic    -> q.5                 1
    1  attn_read.echo     -> k.5                 1
    1  attn_read.type     -> v.4                 2
    1  attn_read.echo     -> v.5                 1
    1  v.4                -> attn_write.recent   1
    1  v.5                -> attn_write.topic    1
    1  mlp_read.recent    -> neuron.0            1
    1  mlp_read.found     -> neuron.1            1
    1  1                  -> neuron.2           -9
    1  mlp_read.recent    -> neuron.2            2
    1  neuron.0           -> mlp_write.every     1
    1  neuron.1           -> mlp_write.every     2
    1  neuron.2           -> mlp_write.found     4
"""
"""What else goes on in `two_hop`: a head that fetches the latest type, whoever's it is, one that averages all types,
neurons that follow notes, types and answer into channels that no probability depends on, two dead ones."""
