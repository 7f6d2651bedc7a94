"""Dead letters: records that can't be applied, kept whole in a topic of their own, with an index in MongoDB."""
