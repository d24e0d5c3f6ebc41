//! Text in, text out: tokenizer, chat template, sampling, sequences and their scheduler over one decoder.
