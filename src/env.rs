//! Every environment variable that is read, and what it means. The Hub's variables mean what they mean to `huggingface_hub`.

/// Address that `serve` listens on; `--host` wins.
pub const HOST: &str = "UPCYCLE_HOST";

/// Port that `serve` listens on; `--port` wins.
pub const PORT: &str = "UPCYCLE_PORT";
