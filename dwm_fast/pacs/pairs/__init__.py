"""The wing of pairs, the paper's study: train on a source, mask, fine-tune on a target, look at both."""
