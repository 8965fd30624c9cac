//! Models from the Hugging Face hub, kept in its standard cache (`HF_HOME`, `~/.cache/huggingface/hub`), which other
//! tools share.
//!
//! A download that breaks off goes on where it stopped, now or at the next start. Without a network, what the cache has
//! is used.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::{
    Cache, Repo,
    api::{
        Progress,
        sync::{Api, ApiBuilder, ApiError, ApiRepo},
    },
};
use indicatif::ProgressBar;
use tracing::{info, warn};

use crate::progress;

/// The quantisation that is fetched if none is named.
const QUANT_DEFAULT: &str = "Q4_K_M";

/// Times that a download is taken up again before the user has to.
const N_RETRY: u32 = 5;

/// A model of the hub.
#[derive(Clone, PartialEq, Eq)]
pub struct HubModel {
    repo: String,
    quant: Option<String>,
    file: Option<String>,
    token: Option<String>,
}

impl fmt::Debug for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.repo, self.quant.as_deref().unwrap_or(QUANT_DEFAULT))
    }
}

impl HubModel {
    /// `owner/repo` or `owner/repo:quant`.
    pub fn parse(text: &str, file: Option<String>, token: Option<String>) -> Result<HubModel> {
        let (repo, quant) = match text.split_once(':') {
            Some((repo, quant)) => (repo, Some(quant.to_string()).filter(|quant| quant != "latest")),
            None => (text, None),
        };
        let good = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let parts: Vec<&str> = repo.split('/').collect();
        ensure!(
            parts.len() == 2 && parts.iter().all(|part| good(part)) && quant.as_deref() != Some(""),
            "-hf: expected owner/repo or owner/repo:quant, found `{text}`"
        );
        Ok(HubModel { repo: repo.to_string(), quant, file, token: token.filter(|token| !token.is_empty()) })
    }
}

/// The path of the model's file, of a split one the first part, after downloading what the cache does not have.
pub fn fetch(model: &HubModel) -> Result<PathBuf> {
    let cache = match std::env::var_os("HF_HUB_CACHE").filter(|dir| !dir.is_empty()) {
        Some(dir) => Cache::new(dir.into()),
        None => Cache::from_env(),
    };
    if std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| crate::flags::switch(&v) == Ok(true)) {
        return cached(&cache, model, "HF_HUB_OFFLINE is set");
    }
    let endpoint = ["MODEL_ENDPOINT", "HF_ENDPOINT"].iter().find_map(|name| std::env::var(name).ok());
    let mut builder =
        ApiBuilder::from_cache(cache.clone()).with_user_agent("paceline", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
    }
    if let Some(token) = &model.token {
        builder = builder.with_token(Some(token.clone()));
    }
    let api = builder.build().map_err(|e| explain(e, &model.repo, "the repository"))?;
    let repo = api.model(model.repo.clone());
    let files: Vec<String> = match repo.info() {
        Ok(info) => info.siblings.into_iter().map(|file| file.rfilename).collect(),
        Err(error) if status(&error).is_none() => {
            let error = explain(error, &model.repo, "the repository");
            return cached(&cache, model, &error.to_string()).map_err(|_| error);
        }
        Err(error) => return Err(explain(error, &model.repo, "the repository")),
    };
    let mut paths = Vec::new();
    for file in choose(&files, model)? {
        paths.push(fetch_file(&api, &repo, &cache, &model.repo, &file)?);
    }
    paths.into_iter().next().context("no file was chosen")
}

fn fetch_file(api: &Api, repo: &ApiRepo, cache: &Cache, repo_name: &str, file: &str) -> Result<PathBuf> {
    if let Some(path) = cache.repo(Repo::model(repo_name.to_string())).get(file) {
        return Ok(path);
    }
    let mut n_retry = 0;
    loop {
        let result = (api.metadata(&repo.url(file)))
            .and_then(|about| Ok((repo.download_with_progress(file, Bar(progress::bytes(0)))?, about)));
        let error = match result {
            Ok((path, about)) => {
                let found =
                    fs::metadata(&path).with_context(|| format!("{}: can't read", path.display()))?.len();
                ensure!(
                    found == about.size() as u64,
                    "{repo_name}: {file}: expected {} bytes, found {found}\nhint: delete {} and run the same command again",
                    about.size(),
                    path.display()
                );
                return Ok(path);
            }
            Err(error) => error,
        };
        match error {
            // What there is of the file cannot be its beginning, or it is all of it and was never renamed.
            ApiError::InvalidResume => discard_part(api, repo, cache, repo_name, file)?,
            ref error if status(error) == Some(416) => discard_part(api, repo, cache, repo_name, file)?,
            error if status(&error).is_some_and(|code| code < 500) => {
                return Err(explain(error, repo_name, file));
            }
            error if n_retry == N_RETRY => return Err(explain(error, repo_name, file)),
            error => {
                warn!("{repo_name}: {file}: {error}; going on where it stopped");
                std::thread::sleep(Duration::from_millis(200 << n_retry));
            }
        }
        n_retry += 1;
        ensure!(
            n_retry <= N_RETRY,
            "{repo_name}: {file}: the download fails again and again\nhint: run the same command later"
        );
    }
}

fn discard_part(api: &Api, repo: &ApiRepo, cache: &Cache, repo_name: &str, file: &str) -> Result<()> {
    let about = api.metadata(&repo.url(file)).map_err(|e| explain(e, repo_name, file))?;
    let mut part = cache.repo(Repo::model(repo_name.to_string())).blob_path(about.etag());
    part.set_extension("part");
    fs::remove_file(&part).with_context(|| format!("{}: can't remove", part.display()))
}

/// The file from the cache, because the hub can't be asked.
fn cached(cache: &Cache, model: &HubModel, why: &str) -> Result<PathBuf> {
    let repo = cache.repo(Repo::model(model.repo.clone()));
    let root = cache.path().join(Repo::model(model.repo.clone()).folder_name());
    let commit = fs::read_to_string(root.join("refs").join("main"))
        .map_err(|_| anyhow!("{}: not in the cache {}, and {why}", model.repo, cache.path().display()))?;
    let snapshot = repo.pointer_path(commit.trim());
    let mut files = Vec::new();
    list(&snapshot, &snapshot, &mut files);
    let chosen = choose(&files, model)?;
    info!("{}: from the cache, as {why}", model.repo);
    Ok(snapshot.join(&chosen[0]))
}

fn list(root: &Path, dir: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            list(root, &path, files);
        } else if let Ok(name) = path.strip_prefix(root) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    files.sort();
}

/// The files to fetch: one, or all parts of a split one, in order.
fn choose(files: &[String], model: &HubModel) -> Result<Vec<String>> {
    let ggufs: Vec<&String> = files
        .iter()
        .filter(|name| name.to_ascii_lowercase().ends_with(".gguf") && !base_name(name).starts_with("mmproj"))
        .collect();
    let listed = || ggufs.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    ensure!(
        !ggufs.is_empty(),
        "{}: no GGUF file in this repository\nhint: paceline convert makes one from a checkpoint",
        model.repo
    );
    let first = match (&model.file, &model.quant) {
        (Some(file), _) => ggufs.iter().find(|name| **name == file),
        (None, Some(quant)) => ggufs.iter().find(|name| has_quant(name, quant)),
        (None, None) => ggufs.iter().find(|name| has_quant(name, QUANT_DEFAULT)).or(ggufs.first()),
    };
    let Some(first) = first else {
        let wanted = model.file.as_ref().or(model.quant.as_ref()).map_or("", String::as_str);
        bail!("{}: no file for `{wanted}`; there are: {}", model.repo, listed());
    };
    let Some((stem, count)) = split_name(first) else { return Ok(vec![first.to_string()]) };
    let parts: Vec<String> = (1..=count).map(|no| format!("{stem}-{no:05}-of-{count:05}.gguf")).collect();
    if let Some(missing) = parts.iter().find(|part| !ggufs.contains(part)) {
        bail!("{}: the model is split into {count} files, of which {missing} is missing there", model.repo);
    }
    Ok(parts)
}

/// `Q4_K_M` in `dir/model-Q4_K_M-00001-of-00002.gguf`: the name between separators, in any case.
fn has_quant(name: &str, quant: &str) -> bool {
    let (name, quant) = (name.to_ascii_lowercase(), quant.to_ascii_lowercase());
    let ends = |c: Option<char>| c.is_none_or(|c| "-./".contains(c));
    (name.match_indices(&quant))
        .any(|(at, _)| ends(name[..at].chars().next_back()) && ends(name[at + quant.len()..].chars().next()))
}

/// Stem and number of parts of `stem-00001-of-00003.gguf`.
fn split_name(name: &str) -> Option<(&str, u32)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    (no.len() == 5 && count.len() == 5).then_some(())?;
    no.parse::<u32>().ok()?;
    count.parse().ok().filter(|&n| (1..=9999).contains(&n)).map(|n| (stem, n))
}

fn base_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn explain(error: ApiError, repo: &str, what: &str) -> anyhow::Error {
    match status(&error) {
        Some(code @ (401 | 403)) => anyhow!(
            "{repo}: {what}: the hub refuses access (status {code})\n\
             hint: check the name; of a private or gated repository accept its conditions on its page and set HF_TOKEN"
        ),
        Some(404) => {
            anyhow!("{repo}: {what}: not found on the hub (status 404)\nhint: check the name, owner/repo")
        }
        Some(code) => anyhow!("{repo}: {what}: the hub answered with status {code}\nhint: try again later"),
        None => {
            anyhow!("{repo}: {what}: {error}\nhint: run the same command again, it goes on where it stopped")
        }
    }
}

struct Bar(ProgressBar);

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
        self.0.set_message(base_name(filename).to_string());
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(spec: &str, files: &[&str], expected: Result<&[&str], &str>) {
        let files: Vec<String> = files.iter().map(|f| f.to_string()).collect();
        let got = HubModel::parse(spec, None, None).and_then(|model| choose(&files, &model));
        match (got, expected) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected),
            (Err(got), Err(part)) => assert!(got.to_string().contains(part), "{got}"),
            (got, expected) => panic!("{spec}: expected {expected:?}, found {got:?}"),
        }
    }

    #[test]
    fn files_are_chosen() {
        let files = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "mmproj-F16.gguf"];
        check("a/b", &files, Ok(&["m-Q4_K_M.gguf"]));
        check("a/b:q8_0", &files, Ok(&["m-Q8_0.gguf"]));
        check("a/b:Q4_K", &files, Err("no file for `Q4_K`; there are: m-Q8_0.gguf, m-Q4_K_M.gguf"));
        check("a/b:F16", &files, Err("no file for `F16`"));
        check("a/b", &["x.gguf"], Ok(&["x.gguf"]));
        check("a/b", &["x.safetensors"], Err("no GGUF file"));
        check("a", &files, Err("expected owner/repo"));
        check("a/..:x", &files, Err("expected owner/repo"));
        check("a/b:", &files, Err("expected owner/repo"));
    }

    #[test]
    fn parts_come_together() {
        let parts = ["q/m-Q4_K_M-00001-of-00002.gguf", "q/m-Q4_K_M-00002-of-00002.gguf"];
        check("a/b", &parts, Ok(&parts));
        check("a/b", &parts[..1], Err("q/m-Q4_K_M-00002-of-00002.gguf is missing"));
    }
}
