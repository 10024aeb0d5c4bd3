"""Text: corpora, tokenizers, and the vocabularies of labels."""
