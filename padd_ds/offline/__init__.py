"""A teacher's responses and likelihoods, kept on disk for distillation without the teacher."""
