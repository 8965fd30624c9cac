//! `POST /slots/{id}?action=save|restore|erase`: what a slot had last, to a file and back.
//!
//! A file is written under another name and renamed when it is complete and on the disk, so that a name never stands for
//! half a snapshot. What is in it, and whether it fits, is the engine's business.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use axum::{
    Json,
    extract::{Path as UrlPath, Query, State},
};
use paceline_engine::{CheckedSnapshot, SaveError};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::{
    app::{App, Body, prepare},
    error::ApiError,
    fields::Fields,
    runner::{SlotAction, SlotOutcome},
};

/// Saves, restores or erases a slot.
pub(crate) async fn slot_action(
    State(app): State<Arc<App>>,
    UrlPath(id): UrlPath<String>,
    Query(query): Query<Vec<(String, String)>>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let slot: usize = id.parse().map_err(|_| ApiError::field("id_slot", "the number of a slot", &id))?;
    let action = query.iter().find(|(name, _)| name == "action").map_or("", |(_, action)| action.as_str());
    let Some(folder) = app.config.slot_save_path.clone() else {
        return Err(ApiError::not_supported(
            "saving, restoring and erasing slots is not supported by this server: start it with --slot-save-path DIR",
        ));
    };
    let begin = Instant::now();
    let ms = |begin: Instant| begin.elapsed().as_secs_f64() * 1e3;
    match action {
        "save" => {
            let (name, path) = named(&app, body, &folder).await?;
            let SlotOutcome::Saved(saved) = app.runner.slot(slot, SlotAction::Save).await? else {
                return Err(ApiError::server("the engine did something else"));
            };
            let n_written = saved.bytes.len();
            blocking(&name, move || write_whole(&path, &saved.bytes)).await?;
            Ok(Json(json!({
                "id_slot": slot,
                "filename": name,
                "n_saved": saved.n_token,
                "n_written": n_written,
                "timings": {"save_ms": ms(begin)},
            })))
        }
        "restore" => {
            let (name, path) = named(&app, body, &folder).await?;
            // Here and not on the engine's thread: others go on meanwhile.
            let read = blocking(&name, move || {
                let bytes = fs::read(path)?;
                Ok((bytes.len(), CheckedSnapshot::new(bytes)))
            });
            let (n_read, file) = read.await?;
            let file = file.map_err(|error| ApiError::from(SaveError::Restore(error)).about(&name))?;
            let outcome = app.runner.slot(slot, SlotAction::Restore(file)).await;
            let outcome = outcome.map_err(|error| error.about(&name))?;
            let SlotOutcome::Restored(restored) = outcome else {
                return Err(ApiError::server("the engine did something else"));
            };
            let mut reply = json!({
                "id_slot": slot,
                "filename": name,
                "n_restored": restored.n_token,
                "n_read": n_read,
                "timings": {"restore_ms": ms(begin)},
            });
            if !restored.serves_drafts {
                reply["note"] =
                    "the file has no part for the drafter: only requests without speculation use it".into();
            }
            Ok(Json(reply))
        }
        "erase" => match app.runner.slot(slot, SlotAction::Erase).await? {
            SlotOutcome::Erased(erased) => Ok(Json(json!({
                "id_slot": slot,
                "n_erased": erased.n_token,
                "n_snapshots": erased.n_snapshot,
            }))),
            _ => Err(ApiError::server("the engine did something else")),
        },
        other => Err(ApiError::field("action", "save, restore or erase", format!("`{other}`"))),
    }
}

/// The file that a request names.
async fn named(app: &Arc<App>, body: Body, folder: &Path) -> Result<(String, PathBuf), ApiError> {
    let name = prepare(app, body, |_, body| {
        let name = Fields::of_body(body)?.string("filename")?.unwrap_or_default();
        check_name(name).map_err(|why| ApiError::field("filename", why, format!("`{name}`")))?;
        Ok(name.to_owned())
    });
    let name = name.await?;
    let path = folder.join(&name);
    Ok((name, path))
}

/// A name is a name and leads nowhere else.
fn check_name(name: &str) -> Result<(), &'static str> {
    let is_odd = |c: char| c.is_control() || "/\\:*?\"<>|".contains(c);
    if name.is_empty() || name.len() > 200 {
        Err("a name of 1 to 200 bytes")
    } else if name.starts_with('.') || name.contains(is_odd) {
        Err("the name of a file, without a path, and not a hidden one")
    } else {
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    name: &str,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    let done =
        spawn_blocking(act).await.map_err(|_| ApiError::server("a file could not be used: this is a bug"))?;
    done.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ApiError::invalid(format!("`filename`: {name}: there is no such file")),
        _ => ApiError::server(format!("{name}: {error}")),
    })
}

/// Writes a file so that its name stands for all of `bytes` or for what it stood for before.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let part = path.with_file_name(format!(".{name}.{}-{n}.part", std::process::id()));
    let written = File::create_new(&part).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for good in ["a", "chat 7.bin", "żółw", "a..b"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../a",
            "a/b",
            "/etc/passwd",
            "a\\b",
            "C:x",
            ".hidden",
            "a\0b",
            "a\nb",
            &"x".repeat(300),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
