//! Every environment variable that is read, and what it means. The Hub's variables mean what they mean to `huggingface_hub`.
