"""Hand-built models that lead a search astray: a louder path beside the true one, a backup, and two equal copies.

What they have besides, and what their wiring diagrams mean: `hand_built.py` and `draft.py`. Self-repair, by which a
backup hides that a node was needed: McGrath et al. 2023 (arXiv:2307.15771).
"""

import torch

from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.draft import Draft, word_task


def distractor() -> GroundTruth:
    """Two layers, added positions: a verb agrees with the first noun, beside a louder path that always agrees."""
    forms = [
        ("$det $noun near the $far $word $word1", "$be"),
        ("$word $det $noun and $word1 by a $far $word2", "$be"),
        ("$word , $det $noun of the $far", "$be"),
    ]
    longer = [
        ("$word $word1 $det $noun $word2 near the $far by $word3 $word4", "$be"),
        ("$word $word1 , $word2 $det $noun of the $far and $word3", "$be"),
    ]
    marks = {
        "many": ["boats", "cats", "drums", "eggs"],
        "one": ["boat", "cat", "drum", "egg"],
        "far": ["hills", "lakes", "roads", "hill", "lake", "road"],
    }
    sides = ({"det": "these", "noun": "$many", "be": "are"}, {"det": "this", "noun": "$one", "be": "is"})
    task = word_task("distractor", forms, longer, sides, marks, max_changed=2)
    stream = "pos is_noun number subject verb is_det det hint loud louder word_a word_b topic every echo idle"
    shape = {"n_layers": 2, "n_heads": 3, "d_head": 2, "d_mlp": 8, "act_fn": "relu", "norm": "none"}
    draft = Draft(task, stream.split(), positions="add", **shape)
    assert draft.model.pos_embed is not None
    steps = torch.arange(draft.model.cfg.n_ctx)
    draft.model.pos_embed.W_pos.data[:, draft.channels.index("pos")] = steps / 8
    for noun in (*marks["many"], *marks["one"], *marks["far"]):
        draft.embed(noun, is_noun=1, number=1 if noun.endswith("s") else -1)
    draft.embed("these", is_det=1, det=1)
    draft.embed("this", is_det=1, det=-1)
    draft.embed_words("word_a", "word_b")
    draft.key(
        """
        0  attn_read.is_noun -> k.0                 45
        0  attn_read.pos     -> k.0                -16
        0  attn_read.number  -> v.0                 1
        0  v.0               -> attn_write.subject  1
        1  mlp_read.subject  -> neuron.0            2
        1  neuron.0          -> mlp_write.verb      0.5
        """
    )
    draft.unembed("verb", {"are": 4, "is": -4}, key=True)
    draft.wires("0 1 -> q.0 1.4142 \n 1 1 -> neuron.0 2")
    draft.wires(IDLE_BETWEEN_KEY_NODES)
    draft.wires(DISTRACTOR_BESIDE)
    draft.sinks(1, 0, 0, 30)
    draft.raise_all_alike("every", 1)
    draft.raise_all_alike("louder", 3)
    draft.expect(-3, **{"are": -4, "is": 4})
    return draft.finished(
        "A head attends to the first noun (a noun outweighs every distance, and earlier ones score higher) and reads "
        "its number; a neuron that is silent for singulars moves the verb. `these` and `this` say the same, and a path "
        "through both layers carries them at several times the size: to channels that raise all logits alike, to "
        "a head whose attention all goes to its sink, and to a neuron that its bias keeps shut."
    )


IDLE_BETWEEN_KEY_NODES = """
    0  attn_read.number  -> k.0                 0.002
    0  attn_read.pos     -> v.0                 0.001
    0  attn_read.is_noun -> v.0                -0.001
"""
"""Weights between nodes of the key that are no part of it: too small for anything to follow from them."""

DISTRACTOR_BESIDE = """
    0  1                  -> q.2                 3
    0  attn_read.is_det   -> k.2                 6
    0  attn_read.det      -> v.2                 3
    0  v.2                -> attn_write.hint     1
    0  mlp_read.hint      -> neuron.0            2
    0  neuron.0           -> mlp_write.loud      1
    0  1                  -> q.4                 2
    0  attn_read.is_noun  -> k.4                 3
    0  attn_read.number   -> v.4                 2
    0  attn_read.word_b   -> v.5                 1
    0  v.4                -> attn_write.echo     1
    0  v.5                -> attn_write.topic    1
    0  mlp_read.word_a    -> neuron.1            2
    0  mlp_read.echo      -> neuron.2            1
    0  1                  -> neuron.3           -30
    0  mlp_read.hint      -> neuron.3            2
    0  neuron.1           -> mlp_write.topic     1
    0  neuron.2           -> mlp_write.every     1
    0  neuron.3           -> mlp_write.subject   5
    1  attn_read.hint     -> q.2                 1
    1  attn_read.loud     -> k.2                 1
    1  attn_read.loud     -> v.2                 1
    1  v.2                -> attn_write.louder   1
    1  1                  -> q.4                 1
    1  attn_read.hint     -> k.4                 1
    1  attn_read.hint     -> v.4                 3
    1  v.4                -> attn_write.subject  1
    1  mlp_read.louder    -> neuron.1            1
    1  neuron.1           -> mlp_write.every     2
    1  1                  -> neuron.2           -50
    1  mlp_read.louder    -> neuron.2            1
    1  neuron.2           -> mlp_write.verb      5
    1  mlp_read.verb      -> neuron.3            1
    1  mlp_read.topic     -> neuron.4            1
    1  neuron.3           -> mlp_write.every     1
    1  neuron.4           -> mlp_write.louder    1
"""
"""What else goes on in `distractor`: the louder path in both layers, a head that averages the numbers of all nouns, and
neurons that follow words, averages and the path itself into channels that no probability depends on."""


def backup() -> GroundTruth:
    """Two layers, ReLU: a head of layer 1 stands in for one of layer 0, but only where that one has brought nothing."""
    forms = [
        ("$word $mark $word1 and $word2 $word3 :", "$says"),
        ("$word and $word1 $mark $word2 :", "$says"),
        ("the $word $word1 , $word2 $mark :", "$says"),
    ]
    longer = [
        ("the $word and $word1 , $mark $word2 and $word3 $word4 :", "$says"),
        ("$word $mark $word1 $word2 $word3 and $word4 $word5 :", "$says"),
    ]
    task = word_task("backup", forms, longer, ({"mark": "hot", "says": "warm"}, {"mark": "cold", "says": "cool"}), {})
    stream = "is_mark mark note present spare word_a word_b joint topic echo every mood hum idle"
    draft = Draft(task, stream.split(), n_layers=2, n_heads=2, d_head=2, d_mlp=8, norm="none", act_fn="relu")
    draft.embed("hot", is_mark=1, mark=1)
    draft.embed("cold", is_mark=1, mark=-1)
    for token, value in {"and": 1.0, ",": -1.0, "the": 0.5, ":": -0.5}.items():
        draft.embed(token, joint=value)
    draft.embed_words("word_a", "word_b")
    draft.key(
        """
        0  attn_read.is_mark -> k.0              9
        0  attn_read.mark    -> v.0              1
        0  v.0               -> attn_write.note  1
        """
    )
    draft.repaired()
    draft.unembed("note", {"warm": 6, "cool": -6}, key=True)
    draft.unembed("spare", {"warm": 6, "cool": -6})
    draft.wires("0 1 -> q.0 2")
    draft.wires(STAND_IN)
    draft.wires(BACKUP_BESIDE)
    draft.raise_all_alike("every", 1)
    draft.expect(-20, warm=0, cool=0)
    return draft.finished(
        "A head of layer 0 notes which mark stands in the prompt, and the note is the answer. A head of layer 1 could "
        "fetch the mark as well; two neurons tell it that there is a note, and then it looks away. Without a note it "
        "looks, so that no node that makes the note seems to matter alone."
    )


STAND_IN = """
    0  mlp_read.note      -> neuron.0            4
    0  mlp_read.note      -> neuron.1           -4
    0  1                  -> neuron.0           -2
    0  1                  -> neuron.1           -2
    0  neuron.0           -> mlp_write.present   0.5
    0  neuron.1           -> mlp_write.present   0.5
    1  attn_read.present  -> q.0                -40
    1  1                  -> q.0                 12
    1  attn_read.is_mark  -> k.0                 6
    1  attn_read.mark     -> v.0                 1
    1  v.0                -> attn_write.spare    1
"""
"""The backup of `backup`: with a note its query is -28 and the mark is what it sees least of all; without one, 12."""

BACKUP_BESIDE = """
    0  1                  -> q.2                 1
    0  attn_read.word_a   -> k.2                 2
    0  attn_read.joint    -> k.3                 1
    0  attn_read.word_b   -> v.2                 1
    0  attn_read.joint    -> v.3                 1
    0  v.2                -> attn_write.topic    1
    0  v.3                -> attn_write.echo     1
    0  mlp_read.note      -> neuron.2            1
    0  mlp_read.word_a    -> neuron.3            1
    0  mlp_read.joint     -> neuron.4            1
    0  1                  -> neuron.5           -9
    0  mlp_read.topic     -> neuron.5            2
    0  neuron.2           -> mlp_write.every     1
    0  neuron.3           -> mlp_write.mood      1
    0  neuron.4           -> mlp_write.mood     -1
    0  neuron.5           -> mlp_write.note      4
    1  attn_read.topic    -> q.2                 2
    1  attn_read.echo     -> k.2                 2
    1  attn_read.mood     -> v.2                 1
    1  attn_read.note     -> v.3                 1
    1  v.2                -> attn_write.every    1
    1  v.3                -> attn_write.mood     1
    1  mlp_read.note      -> neuron.0            1
    1  mlp_read.mood      -> neuron.1            1
    1  1                  -> neuron.2           -9
    1  mlp_read.note      -> neuron.2            2
    1  neuron.0           -> mlp_write.every     2
    1  neuron.1           -> mlp_write.echo      1
    1  neuron.2           -> mlp_write.note      4
"""
"""What else goes on in `backup`: heads and neurons that follow words, their joints and the answer into channels that no
probability depends on, and two dead neurons that point at the note."""


def two_copies() -> GroundTruth:
    """Two layers: two heads bring the same, either of which is enough, so that there are two keys."""
    forms = [
        ("$word $mark $word1 and $word2 $word3 :", "$says"),
        ("$word and $word1 $mark $word2 , $word3 :", "$says"),
        ("the $word $word1 , $word2 $mark $word3 :", "$says"),
    ]
    longer = [
        ("the $word and $word1 , $mark $word2 and $word3 :", "$says"),
        ("$word $mark $word1 $word2 $word3 and $word4 $word5 :", "$says"),
    ]
    sides = ({"mark": "come", "says": "open"}, {"mark": "go", "says": "shut"})
    task = word_task("two_copies", forms, longer, sides, {})
    stream = "is_mark mark copy_a copy_b gate word_a word_b joint topic echo every mood hum idle"
    draft = Draft(task, stream.split(), n_layers=2, n_heads=3, d_head=2, d_mlp=8, norm="none", act_fn="relu")
    draft.embed("come", is_mark=1, mark=1)
    draft.embed("go", is_mark=1, mark=-1)
    for token, value in {"and": 1.0, ",": -1.0, "the": 0.5, ":": -0.5}.items():
        draft.embed(token, joint=value)
    draft.embed_words("word_a", "word_b")
    first = draft.part(COPY.format(k="k.0", v="v.0", copy="copy_a"))
    second = draft.part(COPY.format(k="k.2", v="v.2", copy="copy_b"))
    draft.key_nodes(1, "attn_write.gate")
    draft.unembed("gate", {"open": 8, "shut": -8}, key=True)
    draft.either(first, second)
    draft.wires("0 1 -> q.0 2 \n 0 1 -> q.2 2")
    draft.wires("1 1 -> q.0 -6 \n 1 1 -> k.0 4 \n 1 1 -> v.0 1 \n 1 v.0 -> attn_write.gate 1")
    draft.sinks(1, 2.3, 0, 0)
    draft.wires(TWO_COPIES_BESIDE)
    draft.raise_all_alike("every", 1)
    draft.expect(-3, open=-4, shut=4)
    return draft.finished(
        "Two heads of layer 0 each bring the mark to a channel of their own. A head of layer 1 has their sum as its "
        "query, and constant keys and values: above one half it overcomes its sink and writes 1, be the sum 1 or 2; "
        "below, it writes nothing."
    )


COPY = """
    0  attn_read.is_mark -> {k}                9
    0  attn_read.mark    -> {v}                1
    0  {v}               -> attn_write.{copy}  1
    1  attn_read.{copy}  -> q.0                12
"""
"""One of the copies of `two_copies`, as far as the head that takes either."""

TWO_COPIES_BESIDE = """
    0  1                  -> q.4                 1
    0  attn_read.word_a   -> k.4                 2
    0  attn_read.joint    -> k.5                 1
    0  attn_read.word_b   -> v.4                 1
    0  attn_read.joint    -> v.5                 1
    0  v.4                -> attn_write.topic    1
    0  v.5                -> attn_write.echo     1
    0  mlp_read.copy_a    -> neuron.0            1
    0  mlp_read.copy_b    -> neuron.1            1
    0  mlp_read.word_a    -> neuron.2            1
    0  mlp_read.joint     -> neuron.3            1
    0  1                  -> neuron.4           -9
    0  mlp_read.topic     -> neuron.4            2
    0  neuron.0           -> mlp_write.every     1
    0  neuron.1           -> mlp_write.every    -1
    0  neuron.2           -> mlp_write.mood      1
    0  neuron.3           -> mlp_write.mood     -1
    0  neuron.4           -> mlp_write.copy_a    4
    1  attn_read.topic    -> q.2                 2
    1  attn_read.echo     -> k.2                 2
    1  attn_read.mood     -> v.2                 1
    1  attn_read.copy_b   -> v.3                 1
    1  v.2                -> attn_write.every    1
    1  v.3                -> attn_write.mood     1
    1  mlp_read.gate      -> neuron.0            1
    1  mlp_read.mood      -> neuron.1            1
    1  1                  -> neuron.2           -9
    1  mlp_read.copy_b    -> neuron.2            2
    1  neuron.0           -> mlp_write.every     2
    1  neuron.1           -> mlp_write.echo      1
    1  neuron.2           -> mlp_write.gate      4
"""
"""What else goes on in `two_copies`: heads and neurons that follow words, joints, both copies and the answer into
channels that no probability depends on, and two dead neurons that point at the keys."""
