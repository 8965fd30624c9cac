//! Where a model comes from: a path, the hub, or this binary.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use paceline_gguf::Gguf;

use crate::{
    flags::ModelFlags,
    hub::{self, HubModel},
};

/// The toy pair, so that everything runs on a fresh machine.
const BUNDLED_TARGET: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/bundled/target.gguf"));
const BUNDLED_DRAFTER: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/bundled/drafter.gguf"));

/// A place that a model file can be had from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file.
    Path(PathBuf),
    /// A repository of the hub.
    Hub(HubModel),
    /// A file inside this binary, under this name.
    Bundled(&'static str, &'static [u8]),
}

impl Source {
    /// The target that the flags ask for.
    pub fn target(flags: &ModelFlags) -> Result<Source> {
        match (&flags.model, &flags.hf_repo) {
            (Some(path), _) => Ok(Source::Path(path.clone())),
            (None, Some(repo)) => {
                Ok(Source::Hub(HubModel::parse(repo, flags.hf_file.clone(), flags.hf_token.clone())?))
            }
            (None, None) => Ok(Source::Bundled("bundled/target.gguf", BUNDLED_TARGET)),
        }
    }

    /// The drafter, if there is to be one. The bundled one comes with the bundled target and no other.
    pub fn drafter(flags: &ModelFlags) -> Result<Option<Source>> {
        let given = match (&flags.model_draft, &flags.hf_repo_draft) {
            (Some(path), _) => Some(Source::Path(path.clone())),
            (None, Some(repo)) => Some(Source::Hub(HubModel::parse(repo, None, flags.hf_token.clone())?)),
            (None, None) => None,
        };
        let kinds = flags.drafter_kinds()?;
        if let Some(kinds) = kinds.as_ref().filter(|kinds| !kinds.iter().any(|kind| kind.needs_file())) {
            let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
            ensure!(
                given.is_none() || kinds.is_empty() || kinds.iter().any(|kind| kind.may_have_file()),
                "--spec-type {}: reads no file of its own, and a drafter was given\nhint: add dflash or draft, or leave -md out",
                names.join(",")
            );
            return Ok(given.filter(|_| !kinds.is_empty()));
        }
        let bundled_target = flags.model.is_none() && flags.hf_repo.is_none();
        let drafter =
            given.or(bundled_target.then_some(Source::Bundled("bundled/drafter.gguf", BUNDLED_DRAFTER)));
        ensure!(
            drafter.is_some() || kinds.is_none(),
            "--spec-type {} needs a drafter\nhint: give its file with -md or its repository with -hfd",
            flags.spec_type.as_deref().unwrap_or("dflash")
        );
        Ok(drafter)
    }

    /// A name for people and requests.
    pub fn name(&self) -> String {
        match self {
            Source::Path(path) => {
                path.file_stem().map_or("model".into(), |stem| stem.to_string_lossy().into_owned())
            }
            Source::Hub(model) => format!("{model:?}"),
            Source::Bundled(..) => "bundled".to_string(),
        }
    }

    /// True for a file of this binary.
    pub fn is_bundled(&self) -> bool {
        matches!(self, Source::Bundled(..))
    }

    /// Opens the file, after fetching it if need be.
    pub fn open(&self) -> Result<Gguf> {
        Ok(match self {
            Source::Path(path) => Gguf::open(path)?,
            Source::Hub(model) => Gguf::open(hub::fetch(model)?)?,
            Source::Bundled(name, bytes) => Gguf::from_bytes(name, bytes.to_vec())?,
        })
    }
}
