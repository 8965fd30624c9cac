//! The model families: which checkpoints each takes, and its recipe. One file per family, one line in [`FAMILIES`].

mod decoder;
mod dflash;
mod gemma4;
mod gemma4_assistant;
mod llama;
mod moe;
mod qwen3;
mod qwen35;
mod qwen35moe;
mod qwen3moe;
mod qwen3next;

use std::path::Path;

use crate::Error;
use crate::config::Config;
use crate::recipe::Recipe;

/// Every family. An architecture of Hugging Face belongs to one of them.
pub(crate) const FAMILIES: &[Family] = &[
    qwen35::FAMILY,
    qwen35moe::FAMILY,
    qwen3next::FAMILY,
    qwen3::FAMILY,
    qwen3moe::FAMILY,
    llama::FAMILY,
    dflash::FAMILY,
    gemma4::FAMILY,
    gemma4_assistant::FAMILY,
];

/// A kind of checkpoint that can be converted.
pub(crate) struct Family {
    /// `general.architecture` of the file.
    pub(crate) arch: &'static str,
    /// Names in `architectures` of the config.
    pub(crate) architectures: &'static [&'static str],
    /// Whether it drafts for another model, and so takes a target.
    pub(crate) drafts: bool,
    /// Names keys and tensors. The caller adds what all files have, the tokenizer, and checks that nothing was forgotten.
    pub(crate) write: fn(&mut Recipe, &Config, Option<&Target>) -> Result<(), Error>,
}

/// The model that a drafter is for.
pub(crate) struct Target<'a> {
    pub(crate) dir: &'a Path,
    /// The text model's config.
    pub(crate) config: Config,
}

/// The family of a checkpoint.
pub(crate) fn find(config: &Config) -> Result<&'static Family, Error> {
    let names = config.opt_strings("architectures")?.unwrap_or_default();
    let found = FAMILIES.iter().find(|family| names.iter().any(|name| family.architectures.contains(name)));
    found.ok_or_else(|| {
        let supported: Vec<_> = FAMILIES.iter().flat_map(|family| family.architectures).copied().collect();
        let found = if names.is_empty() {
            "a checkpoint that names none".into()
        } else {
            format!("`{}`", names.join("`, `"))
        };
        Error::Architecture { path: config.path().to_owned(), found, supported: supported.join(", ") }
    })
}

/// The text model's part of a config: multimodal checkpoints nest it.
pub(crate) fn text_config(config: &Config) -> Config {
    config.section("text_config").unwrap_or_else(|| config.clone())
}
