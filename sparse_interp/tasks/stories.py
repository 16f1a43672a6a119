"""Tasks in plain English, for models of stories.

    task               prompt                                            answer    edited to             foil

    pronoun_matching   Lily was sad because                              she       Tom ...               he
    indirect_object    Lily and Tom went out. Lily gave the ball to      Tom       ... Tom gave ...      Lily
    question_mark      Where is the ball                                 ?         There ...             .
    tense              Yesterday Lily                                    walked    Tomorrow ...          will

The first three are the kinds that Drori, February 2026 (*Weight-sparse circuits may be interpretable yet unfaithful*)
used on models of SimpleStories; his prompts are not these. Each is a file of templates, `data/tasks/<name>.json`, whose
words are in `data/tasks/words/stories.json`: names, places, things and regular verbs, no word in two splits.
"""

STORY_TASKS = ("pronoun_matching", "indirect_object", "question_mark", "tense")
"""The tasks, the simplest first."""
