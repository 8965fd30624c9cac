//! What a drafter gains: answers to prompts, plain and speculative.
//!
//! Plain and speculative runs take turns, so that a machine that slows down slows both; their tokens must be the same,
//! and the report says whether they were; if not, or if an output was not finite, or no draft was ever right, the exit
//! code says so too. Acceptance alone is not health: of a model that says "own own own" everything is accepted. So the words
//! of the answers are counted too, and a text that goes round in circles is named.

use std::{collections::HashSet, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use paceline_engine::{Engine, Request, RequestId, Token};
use paceline_sampling::{DryBreakers, SamplingParams};
use serde_json::{Value, json};

use super::BenchArgs;
use crate::{
    answer::{Answer, answer_all},
    chat::Chat,
    flags::TemplateFlags,
    load::Loaded,
    output::say,
    progress,
    run::dry_breakers,
};

/// One of each kind of text that the bundled model knows; real models answer them too.
const PROMPTS: &[(&str, &str)] = &[
    ("story", "Write a story about a lost kite."),
    ("json", "Write JSON for a cat named Luna."),
    ("count", "Count from 3 in steps of 4, 12 numbers."),
    ("sum", "What is 17 plus 25?"),
    ("code", "Write a Python function add."),
    ("chat", "Tell me about a brave little fox."),
];

/// Measures prefill and both ways of decoding.
pub fn run(args: &BenchArgs, loaded: &Loaded) -> Result<ExitCode> {
    ensure!(args.runs > 0 && args.n_predict > 0, "--runs, -n: expected at least 1");
    let mut params = args.sampling.params()?;
    // Greedy unless asked otherwise: figures are to be compared from day to day.
    params.temperature = args.sampling.temp.unwrap_or(0.0);
    params.validate(loaded.tokenizer.vocab().len())?;
    let mut bench = Bench {
        breakers: dry_breakers(&params, &loaded.tokenizer),
        params,
        n_predict: args.n_predict,
        plain: loaded.engine(false)?,
        speculative: (!loaded.drafters.is_empty()).then(|| loaded.engine(true)).transpose()?,
        n_request: 0,
    };
    let line = progress::words("measuring");
    let prefill = bench.prefill(loaded, args.n_prompt, args.runs)?;
    let groups = groups(args, loaded)?;
    let mut rows = Vec::new();
    for (i, (name, prompts)) in groups.iter().enumerate() {
        line.set_message(format!("{name} ({} of {})", i + 1, groups.len()));
        rows.push(bench.row(name, prompts, args.runs)?);
    }
    line.finish_and_clear();
    let report = Report { prefill, rows, n_bad: bench.n_bad(), n_slot: loaded.sizes.n_slot };
    match args.json {
        true => say(format_args!("{}", serde_json::to_string_pretty(&report.to_json(args, loaded, &bench))?)),
        false => report.print(loaded, &bench),
    }?;
    let faults = report.faults(&bench);
    for row in report.rows.iter().filter(|row| row.words.are_repetitive()) {
        eprintln!("warning: {}: the answer repeats itself, its acceptance says little", row.name);
    }
    for fault in &faults {
        eprintln!("error: {fault}");
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Drafted tokens of which one at least should have been accepted.
const USELESS_AFTER: usize = 64;

type Group = (String, Vec<Vec<Token>>);

/// The prompts, as many side by side as there are slots.
fn groups(args: &BenchArgs, loaded: &Loaded) -> Result<Vec<Group>> {
    let chat = Chat::new(&loaded.tokenizer, &loaded.template, &args.template)?;
    let mut texts: Vec<(String, String)> = Vec::new();
    if let Some(path) = &args.file {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{}: can't read", path.display()))?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        texts.extend(lines.enumerate().map(|(i, line)| (format!("line {}", i + 1), line.to_string())));
    } else if args.prompt.is_empty() {
        texts.extend(PROMPTS.iter().map(|(name, text)| (name.to_string(), text.to_string())));
    } else {
        texts.extend(
            args.prompt.iter().enumerate().map(|(i, text)| (format!("prompt {}", i + 1), text.clone())),
        );
    }
    ensure!(!texts.is_empty(), "no prompts: expected at least one line");
    let prompts = texts
        .into_iter()
        .map(|(name, text)| {
            let prompt = if args.no_chat { chat.raw(&text)? } else { chat.question(None, &text)? };
            Ok((name, prompt.tokens))
        })
        .collect::<Result<Vec<_>>>()?;
    let n = loaded.sizes.n_slot;
    let beside = |first: usize| (0..n).map(|i| prompts[(first + i) % prompts.len()].1.clone()).collect();
    Ok((prompts.iter().enumerate())
        .map(|(i, (name, _))| (if n == 1 { name.clone() } else { format!("{name} +{}", n - 1) }, beside(i)))
        .collect())
}

struct Bench {
    params: SamplingParams,
    breakers: std::sync::Arc<DryBreakers>,
    n_predict: usize,
    plain: Engine,
    speculative: Option<Engine>,
    n_request: u64,
}

impl Bench {
    fn requests(&mut self, prompts: &[Vec<Token>], n_predict: usize) -> Vec<Request> {
        (prompts.iter())
            .map(|prompt| {
                self.n_request += 1;
                let mut request = Request::new(RequestId(self.n_request), prompt.clone());
                request.sampling = self.params.clone();
                request.dry_breakers = self.breakers.clone();
                request.n_predict = Some(n_predict);
                request
            })
            .collect()
    }

    fn measure(&mut self, prompts: &[Vec<Token>], n_predict: usize, speculate: bool) -> Result<Measured> {
        let requests = self.requests(prompts, n_predict);
        let engine = match &mut self.speculative {
            Some(engine) if speculate => engine,
            _ => &mut self.plain,
        };
        Ok(Measured { answers: answer_all(engine, requests, |_, _, _| Ok(true))? })
    }

    /// Prompt tokens per second: plain, and with the drafter reading along.
    fn prefill(&mut self, loaded: &Loaded, n_prompt: usize, n_run: usize) -> Result<Option<Prefill>> {
        let n_prompt = n_prompt.min(loaded.sizes.n_ctx.saturating_sub(2));
        if n_prompt == 0 {
            return Ok(None);
        }
        let text: String = PROMPTS.iter().map(|(_, text)| format!("{text} ")).collect();
        let chat = Chat::new(&loaded.tokenizer, &loaded.template, &TemplateFlags::default())?;
        let prompt = vec![chat.raw(&text)?.tokens.into_iter().cycle().take(n_prompt).collect::<Vec<_>>()];
        let mut rates = [Vec::new(), Vec::new()];
        for run in 0..=n_run {
            for speculate in [false, true] {
                let measured = self.measure(&prompt, 1, speculate)?;
                if run > 0 {
                    rates[usize::from(speculate)].push(measured.answers[0].prompt_per_second());
                }
            }
        }
        let [plain, speculative] = rates.map(|rates| Spread::of(&rates));
        Ok(Some(Prefill { n_prompt, plain, speculative: self.speculative.is_some().then_some(speculative) }))
    }

    fn row(&mut self, name: &str, prompts: &[Vec<Token>], n_run: usize) -> Result<Row> {
        let n_predict = self.n_predict;
        let (mut plain, mut speculative, mut same) = (Vec::new(), Vec::new(), true);
        let mut last = self.measure(prompts, n_predict, false)?; // untimed: touches everything once
        let expected = last.tokens();
        let mut last_plain = last.clone();
        for run in 0..n_run {
            let order = if run % 2 == 0 { [false, true] } else { [true, false] };
            for speculate in order {
                if speculate && self.speculative.is_none() {
                    continue;
                }
                let measured = self.measure(prompts, n_predict, speculate)?;
                same &= measured.tokens() == expected;
                match speculate {
                    true => speculative.push(measured.decode_per_second()),
                    false => plain.push(measured.decode_per_second()),
                }
                if speculate {
                    last = measured;
                } else {
                    last_plain = measured;
                }
            }
        }
        if self.speculative.is_none() {
            last = last_plain;
        }
        Ok(Row {
            name: name.to_string(),
            plain: Spread::of(&plain),
            speculative: self.speculative.is_some().then(|| Spread::of(&speculative)),
            same,
            words: Words::of(&last.answers),
            answers: last.answers,
        })
    }

    /// Outputs that were not finite, of target and drafter.
    fn n_bad(&self) -> u64 {
        let engines = [Some(&self.plain), self.speculative.as_ref()];
        engines.into_iter().flatten().map(|e| e.counters().n_bad_logits + e.counters().n_bad_drafts).sum()
    }
}

/// Answers that were computed side by side.
#[derive(Clone)]
struct Measured {
    answers: Vec<Answer>,
}

impl Measured {
    fn tokens(&self) -> Vec<Vec<Token>> {
        self.answers.iter().map(|answer| answer.tokens.iter().map(|t| t.id).collect()).collect()
    }

    /// Tokens of all answers after their first ones, from the first one of any to the last one of all.
    fn decode_per_second(&self) -> f64 {
        let begin = self.answers.iter().map(|a| a.prompt_time).min().unwrap_or_default();
        let end = self.answers.iter().map(|a| a.prompt_time + a.decode_time).max().unwrap_or_default();
        let n: usize = self.answers.iter().map(|a| a.stats.n_predicted.saturating_sub(1)).sum();
        let span = end.saturating_sub(begin);
        if span == Duration::ZERO { 0.0 } else { n as f64 / span.as_secs_f64() }
    }
}

struct Prefill {
    n_prompt: usize,
    plain: Spread,
    speculative: Option<Spread>,
}

/// Mean and sample deviation.
#[derive(Clone, Copy)]
struct Spread {
    mean: f64,
    deviation: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Spread {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n.max(1.0);
        let square: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Spread { mean, deviation: if values.len() > 1 { (square / (n - 1.0)).sqrt() } else { 0.0 } }
    }

    fn to_json(self) -> Value {
        json!({ "mean": self.mean, "deviation": self.deviation })
    }

    fn show(self) -> String {
        format!("{:.1} ±{:.1}", self.mean, self.deviation)
    }
}

/// How varied the text is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Words {
    n: usize,
    unique_share: f64,
    /// Words equal to the one before.
    n_repeat: usize,
}

impl Words {
    /// A quarter of the words said twice in a row, or a long text of a few words: no text that anybody asked for.
    fn are_repetitive(&self) -> bool {
        (self.n >= 8 && self.n_repeat * 4 >= self.n) || (self.n >= 64 && self.unique_share < 0.1)
    }

    fn of(answers: &[Answer]) -> Words {
        let mut all = Words { n: 0, unique_share: 0.0, n_repeat: 0 };
        let mut n_unique = 0;
        for answer in answers {
            let words = Words::in_text(&answer.text);
            n_unique += (words.unique_share * words.n as f64).round() as usize;
            all.n += words.n;
            all.n_repeat += words.n_repeat;
        }
        all.unique_share = if all.n == 0 { 0.0 } else { n_unique as f64 / all.n as f64 };
        all
    }

    fn in_text(text: &str) -> Words {
        let words: Vec<String> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect();
        let n_unique = words.iter().collect::<HashSet<_>>().len();
        Words {
            n: words.len(),
            unique_share: if words.is_empty() { 0.0 } else { n_unique as f64 / words.len() as f64 },
            n_repeat: words.windows(2).filter(|pair| pair[0] == pair[1]).count(),
        }
    }
}

struct Row {
    name: String,
    plain: Spread,
    speculative: Option<Spread>,
    same: bool,
    words: Words,
    answers: Vec<Answer>,
}

/// What drafts came to over some answers.
#[derive(Default)]
struct Acceptance {
    n_predicted: usize,
    n_verify: usize,
    n_draft: usize,
    n_accepted: usize,
    by_position: Vec<(usize, usize)>,
}

impl Acceptance {
    fn of<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Acceptance {
        let mut all = Acceptance::default();
        for stats in answers.into_iter().map(|answer| &answer.stats) {
            all.n_predicted += stats.n_predicted;
            all.n_verify += stats.n_verify;
            all.n_draft += stats.n_draft;
            all.n_accepted += stats.n_accepted;
            if all.by_position.len() < stats.by_position.len() {
                all.by_position.resize(stats.by_position.len(), (0, 0));
            }
            for (sum, (drafted, accepted)) in all.by_position.iter_mut().zip(&stats.by_position) {
                *sum = (sum.0 + drafted, sum.1 + accepted);
            }
        }
        all
    }

    fn accept_len(&self) -> f64 {
        if self.n_verify == 0 { 0.0 } else { self.n_predicted as f64 / self.n_verify as f64 }
    }

    fn share(&self) -> f64 {
        if self.n_draft == 0 { 0.0 } else { self.n_accepted as f64 / self.n_draft as f64 }
    }

    fn to_json(&self) -> Value {
        json!({
            "n_predicted": self.n_predicted,
            "n_verify": self.n_verify,
            "draft_n": self.n_draft,
            "draft_n_accepted": self.n_accepted,
            "accept_len": self.accept_len(),
            "acceptance": self.share(),
            "by_position": self.by_position.iter().map(|(drafted, accepted)| json!([drafted, accepted])).collect::<Value>(),
        })
    }
}

struct Report {
    prefill: Option<Prefill>,
    rows: Vec<Row>,
    n_bad: u64,
    n_slot: usize,
}

impl Report {
    fn same(&self) -> bool {
        self.rows.iter().all(|row| row.same)
    }

    /// What makes a bench fail, so that it can stand guard.
    fn faults(&self, bench: &Bench) -> Vec<String> {
        let (mut faults, totals) = (Vec::new(), self.totals());
        if !self.same() {
            faults.push(
                "plain and speculative runs gave different tokens: this is a bug, please report it"
                    .to_string(),
            );
        }
        if self.n_bad > 0 {
            faults.push(format!("{} outputs were not finite", self.n_bad));
        }
        if bench.speculative.is_some() && totals.n_accepted == 0 && totals.n_draft >= USELESS_AFTER {
            faults.push(format!(
                "none of {} drafted tokens was accepted: is this the target's drafter?",
                totals.n_draft
            ));
        }
        faults
    }

    /// Time for all answers, plain against speculative.
    fn speed_up(&self) -> Option<f64> {
        let n = |row: &Row| Acceptance::of(&row.answers).n_predicted as f64;
        let plain: f64 = self.rows.iter().map(|row| n(row) / row.plain.mean).sum();
        let speculative: Option<f64> = self.rows.iter().map(|row| Some(n(row) / row.speculative?.mean)).sum();
        speculative.map(|speculative| plain / speculative)
    }

    fn totals(&self) -> Acceptance {
        Acceptance::of(self.rows.iter().flat_map(|row| &row.answers))
    }

    fn print(&self, loaded: &Loaded, bench: &Bench) -> Result<()> {
        say(format_args!("{} on {}", loaded.name, loaded.backend.describe()))?;
        match contracts(bench) {
            Some(contracts) => say(format_args!("{contracts}"))?,
            None => say(format_args!("no drafter: nothing to compare with"))?,
        }
        if let Some(prefill) = &self.prefill {
            let with =
                prefill.speculative.map_or(String::new(), |s| format!(", with the drafter {}", s.show()));
            say(format_args!(
                "prefill of {} tokens: {} tok/s{with}",
                prefill.n_prompt,
                prefill.plain.show()
            ))?;
        }
        say(format_args!(
            "\n{:<12} {:>6} {:>16} {:>16} {:>8} {:>10} {:>8} {:>4} {:>5} {:>6} {:>7}",
            "prompt",
            "tokens",
            "plain tok/s",
            "spec tok/s",
            "speed-up",
            "accept_len",
            "accepted",
            "same",
            "words",
            "unique",
            "repeats"
        ))?;
        for row in &self.rows {
            let all = Acceptance::of(&row.answers);
            let spec = row.speculative;
            say(format_args!(
                "{:<12} {:>6} {:>16} {:>16} {:>8} {:>10.2} {:>7.0}% {:>4} {:>5} {:>5.0}% {:>7}",
                row.name,
                all.n_predicted,
                row.plain.show(),
                spec.map_or("-".to_string(), Spread::show),
                spec.map_or("-".to_string(), |s| format!("{:.2}×", s.mean / row.plain.mean)),
                all.accept_len(),
                100.0 * all.share(),
                if row.same { "yes" } else { "NO" },
                row.words.n,
                100.0 * row.words.unique_share,
                row.words.n_repeat,
            ))?;
        }
        let totals = self.totals();
        if let Some(speed_up) = self.speed_up() {
            let by_position: Vec<String> = (totals.by_position.iter())
                .map(|(drafted, accepted)| {
                    format!("{:.0}", 100.0 * *accepted as f64 / (*drafted).max(1) as f64)
                })
                .collect();
            say(format_args!(
                "\nall: {speed_up:.2}× as fast, {:.2} tokens per forward, {:.0} % of {} drafted tokens accepted",
                totals.accept_len(),
                100.0 * totals.share(),
                totals.n_draft
            ))?;
            say(format_args!("accepted by position, %: {}", by_position.join(" ")))?;
            let [draft, verify, commit] = stage_seconds(bench).map(|(_, seconds)| seconds);
            let share = |seconds: f64| 100.0 * seconds / (draft + verify + commit).max(f64::MIN_POSITIVE);
            say(format_args!(
                "time with the drafter: {:.0} % drafting, {:.0} % verifying, {:.0} % committing",
                share(draft),
                share(verify),
                share(commit)
            ))?;
            say(format_args!(
                "plain and speculative runs gave {}",
                if self.same() {
                    "the same tokens"
                } else {
                    "DIFFERENT tokens: this is a bug, please report it"
                }
            ))?;
        }
        say(format_args!("outputs that were not finite: {}", self.n_bad))
    }

    fn to_json(&self, args: &BenchArgs, loaded: &Loaded, bench: &Bench) -> Value {
        let rows: Vec<Value> = (self.rows.iter())
            .map(|row| {
                let mut object = json!({
                    "name": row.name,
                    "plain_tok_s": row.plain.to_json(),
                    "speculative_tok_s": row.speculative.map(Spread::to_json),
                    "speed_up": row.speculative.map(|s| s.mean / row.plain.mean),
                    "same_tokens": row.same,
                    "n_word": row.words.n,
                    "unique_word_share": row.words.unique_share,
                    "n_repeat": row.words.n_repeat,
                    "is_repetitive": row.words.are_repetitive(),
                    "text": row.answers.iter().map(|a| a.text.as_str()).collect::<Vec<_>>(),
                });
                if let (Value::Object(object), Value::Object(acceptance)) =
                    (&mut object, Acceptance::of(&row.answers).to_json())
                {
                    object.extend(acceptance);
                }
                object
            })
            .collect();
        json!({
            "build": env!("PACELINE_BUILD"),
            "model": loaded.name,
            "backend": loaded.backend.describe(),
            "drafter": contracts(bench),
            "n_draft_max": bench.speculative.as_ref().map_or(0, |engine| engine.config().n_draft_max),
            "n_slot": self.n_slot,
            "runs": args.runs,
            "temperature": bench.params.temperature,
            "prefill": self.prefill.as_ref().map(|prefill| json!({
                "n_prompt": prefill.n_prompt,
                "plain_tok_s": prefill.plain.to_json(),
                "speculative_tok_s": prefill.speculative.map(Spread::to_json),
            })),
            "prompts": rows,
            "total": {
                "speed_up": self.speed_up(),
                "acceptance": self.totals().to_json(),
                "same_tokens": self.same(),
                "n_not_finite": self.n_bad,
                "stage_s": stage_seconds(bench).into_iter().map(|(name, s)| (name.to_string(), json!(s)))
                    .collect::<serde_json::Map<_, _>>(),
            },
        })
    }
}

/// One line for each drafter.
fn contracts(bench: &Bench) -> Option<String> {
    let lines = bench.speculative.as_ref()?.drafters().iter().map(|drafter| drafter.contract());
    Some(lines.collect::<Vec<_>>().join("\n"))
}

/// Where the time of all runs with the drafter went, prefill and warm-up included.
fn stage_seconds(bench: &Bench) -> [(&'static str, f64); 3] {
    let times = bench.speculative.as_ref().map_or_else(Default::default, |engine| engine.counters().times);
    [("draft", times.draft), ("verify", times.verify), ("commit", times.commit)]
        .map(|(name, time)| (name, time.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, n: usize, unique_share: f64, n_repeat: usize) {
        assert_eq!(Words::in_text(text), Words { n, unique_share, n_repeat }, "{text:?}");
    }

    #[test]
    fn words_are_counted() {
        check("", 0, 0.0, 0);
        check("own own Own, own!", 4, 0.25, 3);
        check("a cat and a dog", 5, 0.8, 0);
    }

    #[test]
    fn circles_are_told_from_text() {
        let check = |text: &str, expected: bool| {
            assert_eq!(Words::in_text(text).are_repetitive(), expected, "{text:?}");
        };
        check("", false);
        check("no no no", false);
        check(&"own ".repeat(8), true);
        check(&"the cat sat on the mat ".repeat(3), false);
        check(&"the cat sat on the mat ".repeat(11), true);
        check("Once upon a time there was a very, very big kite in the sky.", false);
    }

    #[test]
    fn spread() {
        let spread = Spread::of(&[1.0, 3.0]);
        assert_eq!((spread.mean, spread.deviation), (2.0, 2f64.sqrt()));
        assert_eq!(Spread::of(&[5.0]).deviation, 0.0);
    }
}
