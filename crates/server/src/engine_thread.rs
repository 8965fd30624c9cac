//! The loop of the thread that owns the engine.
//!
//! A panic inside the engine ends here. Requests that had a slot fail, the engine is made again, those that had only
//! waited start over (once: one that panics on its way in does not get a second victim), and the state that
//! `/health` shows says what is going on throughout.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use paceline_engine::{
    Counters, Engine, Event, Request, RequestId, SlotStatus, SpeculationNote, Stats, Step,
};
use serde_json::Value;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    watch,
};

use crate::{
    error::ApiError,
    runner::{
        Command, DrafterStatus, Ending, EngineFactory, EngineStatus, Events, Failure, Health, Progress,
        Refusal, SlotAction, SlotLook, SlotOutcome, Submission, Totals, guarded, panic_text,
    },
    timings::Timings,
};

/// A request between submit and its last event.
struct Flight {
    index: usize,
    events: Events,
    settings: Arc<Value>,
    /// Kept until it has a slot, so that a failure of others does not take it along.
    waiting: Option<Request>,
    n_try: u32,
    n_prompt: usize,
    started: Option<Instant>,
    n_cached: usize,
    first: Option<Instant>,
    last: Instant,
    n_predicted: usize,
}

impl Flight {
    fn send(&self, progress: Progress) {
        // A closed channel is a client that went away: seen and cancelled at the next step boundary.
        let _ = self.events.send((self.index, progress));
    }

    fn timings(&self) -> Timings {
        let span = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        Timings {
            cache_n: self.n_cached,
            prompt_n: self.n_prompt - self.n_cached,
            prompt_ms: span(self.started, self.first),
            predicted_n: self.n_predicted,
            predicted_ms: span(self.first, Some(self.last)),
            ..Timings::default()
        }
    }
}

/// The thread's own.
pub(crate) struct EngineThread {
    engine: Option<Engine>,
    factory: EngineFactory,
    commands: mpsc::Receiver<Command>,
    health: Arc<watch::Sender<Health>>,
    flights: HashMap<RequestId, Flight>,
    totals: Totals,
    /// Counters of engines that are no more.
    past: Counters,
    events: Vec<Event>,
    draining: bool,
    last_restart: Instant,
}

/// After a restart that failed, requests are refused for this long before the next try.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Longest time for writing what is cached before the process ends.
const PUT_AWAY_MAX: Duration = Duration::from_secs(30);

impl EngineThread {
    pub fn new(
        engine: Engine,
        factory: EngineFactory,
        commands: mpsc::Receiver<Command>,
        health: Arc<watch::Sender<Health>>,
    ) -> EngineThread {
        EngineThread {
            engine: Some(engine),
            factory,
            commands,
            health,
            flights: HashMap::new(),
            totals: Totals::default(),
            past: Counters::default(),
            events: Vec::new(),
            draining: false,
            last_restart: Instant::now(),
        }
    }

    /// Until the last handle is gone.
    pub fn run(mut self) {
        loop {
            if self.flights.is_empty() && !self.has_chores() {
                match self.commands.blocking_recv() {
                    Some(command) => self.obey(command),
                    None => return,
                }
            }
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Disconnected) if self.flights.is_empty() => return,
                    Err(_) => break,
                }
            }
            self.drop_hung_up();
            self.step();
        }
    }

    /// True if snapshots are on their way to a file or from one.
    fn has_chores(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::has_chores)
    }

    /// Lets the cache write what it holds, for as long as that may take.
    fn close(&mut self) {
        self.drop_hung_up();
        let begin = Instant::now();
        let mut put_away = self.guard(|engine, _| engine.put_away());
        while put_away.is_ok() && self.has_chores() {
            if begin.elapsed() > PUT_AWAY_MAX {
                tracing::warn!(
                    "the prompt cache was not written to its end: that took more than {PUT_AWAY_MAX:?}"
                );
                return;
            }
            put_away = self.guard(|engine, events| _ = engine.step(events));
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Runs `act` on the engine. A panic inside ends the engine, not the thread.
    fn guard<T>(&mut self, act: impl FnOnce(&mut Engine, &mut Vec<Event>) -> T) -> Result<T, String> {
        let (Some(engine), events) = (&mut self.engine, &mut self.events) else {
            return Err("the engine is down".into());
        };
        catch_unwind(AssertUnwindSafe(|| act(engine, events))).map_err(|panic| panic_text(&*panic))
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(*submission),
            Command::Status(reply) => {
                let _ = reply.send(Box::new(self.status()));
            }
            Command::Slot(slot, action, reply) => {
                let acted = self.guard(|engine, _| match action {
                    SlotAction::Save => engine.save(slot).map(SlotOutcome::Saved),
                    SlotAction::Restore(file) => engine.restore(slot, &file).map(SlotOutcome::Restored),
                    SlotAction::Erase => engine.erase(slot).map(SlotOutcome::Erased),
                });
                match acted {
                    Ok(outcome) => {
                        let _ = reply.send(outcome.map_err(ApiError::from));
                    }
                    Err(reason) => {
                        let _ = reply.send(Err(Refusal::Down(reason.clone()).into()));
                        if self.engine.is_some() {
                            self.restart(reason);
                        }
                    }
                }
            }
            Command::Drain => {
                self.draining = true;
                let waiting: Vec<RequestId> =
                    self.flights.iter().filter(|(_, f)| f.waiting.is_some()).map(|(id, _)| *id).collect();
                for id in waiting {
                    self.end(id, Progress::Failed(Failure::ShuttingDown));
                }
            }
            Command::Finish => self.finish_all(),
            Command::Close(reply) => {
                self.close();
                let _ = reply.send(());
            }
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { request, index, events, settings } = submission;
        let refuse = |refusal| {
            let _ = events.send((index, Progress::Refused(refusal)));
        };
        if self.draining {
            return refuse(Refusal::ShuttingDown);
        }
        if self.engine.is_none() {
            if self.last_restart.elapsed() > RESTART_PAUSE {
                self.make_engine();
            }
            if let Health::Down(reason) = self.health.borrow().clone() {
                self.totals.n_refused += 1;
                return refuse(Refusal::Down(reason));
            }
        }
        let id = request.id;
        let flight = Flight {
            index,
            n_prompt: request.prompt.len(),
            waiting: Some(request.clone()),
            n_try: 1,
            settings,
            started: None,
            n_cached: 0,
            first: None,
            last: Instant::now(),
            n_predicted: 0,
            events: events.clone(),
        };
        match self.guard(|engine, _| engine.submit(request)) {
            Ok(Ok(())) => {
                flight.send(Progress::Queued);
                self.flights.insert(id, flight);
            }
            Ok(Err(error)) => {
                self.totals.n_refused += 1;
                refuse(Refusal::Engine(error));
            }
            Err(reason) => {
                refuse(Refusal::Down(reason.clone()));
                self.restart(reason);
            }
        }
    }

    /// Cancels the requests that nobody listens to any more.
    fn drop_hung_up(&mut self) {
        let gone: Vec<RequestId> =
            self.flights.iter().filter(|(_, f)| f.events.is_closed()).map(|(id, _)| *id).collect();
        for id in gone {
            self.flights.remove(&id);
            self.totals.n_cancelled += 1;
            if let Err(reason) = self.guard(|engine, _| engine.cancel(id)) {
                return self.restart(reason);
            }
        }
    }

    fn step(&mut self) {
        if (self.flights.is_empty() && !self.has_chores()) || self.engine.is_none() {
            return;
        }
        let before = Instant::now();
        let outcome = self.guard(|engine, events| engine.step(events));
        let now = Instant::now();
        let mut events = std::mem::take(&mut self.events);
        let quiet = events.is_empty();
        for event in events.drain(..) {
            self.dispatch(event, before, now);
        }
        self.events = events;
        match outcome {
            Ok(Step::Ran { .. }) => {}
            // Work that the engine can't get at, or files that take their time, would otherwise burn a core.
            Ok(Step::Idle) if quiet => thread::sleep(Duration::from_millis(1)),
            Ok(Step::Idle) => {}
            Err(reason) => self.restart(reason),
        }
    }

    fn dispatch(&mut self, event: Event, before: Instant, now: Instant) {
        let id = match &event {
            Event::Started { request, .. }
            | Event::Prefill { request, .. }
            | Event::Tokens { request, .. }
            | Event::Done { request, .. }
            | Event::Failed { request, .. } => *request,
        };
        let Some(flight) = self.flights.get_mut(&id) else { return };
        match event {
            Event::Started { slot, n_cached, .. } => {
                flight.waiting = None;
                flight.started = Some(before);
                flight.last = before;
                flight.n_cached = n_cached;
                flight.send(Progress::Started { slot });
            }
            Event::Prefill { n_computed, n_prompt, .. } => {
                let ms = flight.started.map_or(0.0, |started| (now - started).as_secs_f64() * 1e3);
                flight.send(Progress::Prefill { n_computed, n_prompt, n_cached: flight.n_cached, ms });
            }
            Event::Tokens { text, tokens, .. } => {
                let spent = now.saturating_duration_since(flight.last).as_secs_f64();
                if flight.first.is_none() {
                    flight.first = Some(now);
                    let spent = flight.started.map_or(0.0, |started| (now - started).as_secs_f64());
                    self.totals.prompt_tokens += (flight.n_prompt - flight.n_cached) as u64;
                    self.totals.prompt_seconds += spent;
                } else {
                    self.totals.predicted_seconds += spent;
                }
                self.totals.predicted_tokens += tokens.len() as u64;
                flight.n_predicted += tokens.len();
                flight.last = now;
                flight.send(Progress::Tokens { text, tokens, timings: flight.timings() });
            }
            Event::Done { text, finish, stats, .. } => {
                let mut timings = flight.timings();
                (timings.draft_n, timings.draft_n_accepted) = (stats.n_draft, stats.n_accepted);
                log_done(id, &stats, &timings);
                flight.send(Progress::Done { text, ending: Ending::Finished(finish), stats, timings });
                self.totals.n_done += 1;
                self.flights.remove(&id);
            }
            Event::Failed { error, .. } => {
                tracing::warn!(request = id.0, %error, "request failed");
                flight.send(Progress::Failed(Failure::Engine(error)));
                self.totals.n_failed += 1;
                self.flights.remove(&id);
            }
        }
    }

    /// The last word about a request that the engine still has.
    fn end(&mut self, id: RequestId, last_word: Progress) {
        if let Some(flight) = self.flights.remove(&id) {
            flight.send(last_word);
        }
        if let Err(reason) = self.guard(|engine, _| engine.cancel(id)) {
            self.restart(reason);
        }
    }

    fn finish_all(&mut self) {
        let ids: Vec<RequestId> = self.flights.keys().copied().collect();
        for id in ids {
            let Some(flight) = self.flights.get(&id) else { continue };
            if flight.started.is_none() {
                self.end(id, Progress::Failed(Failure::ShuttingDown));
                continue;
            }
            let mut timings = flight.timings();
            // An engine that is down has no figures to give.
            let stats = self.guard(|engine, _| engine.stats(id).cloned()).ok().flatten().unwrap_or_default();
            (timings.draft_n, timings.draft_n_accepted) = (stats.n_draft, stats.n_accepted);
            self.end(id, Progress::Done { text: String::new(), ending: Ending::ShutDown, stats, timings });
        }
    }

    /// Replaces an engine that panicked.
    fn restart(&mut self, reason: String) {
        tracing::error!(%reason, "the engine failed and is made again");
        self.health
            .send_if_modified(|health| set_unless_stopping(health, Health::Restarting(reason.clone())));
        self.totals.n_restart += 1;
        if let Some(engine) = self.engine.take() {
            add(&mut self.past, engine.counters());
            // What is broken may well break again while it is taken down.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(engine)));
        }
        let mut waiting = Vec::new();
        self.flights.retain(|_, flight| match flight.waiting.clone().filter(|_| flight.n_try < 2) {
            Some(request) => {
                flight.n_try += 1;
                waiting.push(request);
                true
            }
            None => {
                flight.send(Progress::Failed(Failure::Panicked(reason.clone())));
                self.totals.n_failed += 1;
                false
            }
        });
        self.make_engine();
        waiting.sort_by_key(|request| request.id);
        for request in waiting {
            let id = request.id;
            let taken = self.guard(|engine, _| engine.submit(request));
            if !matches!(taken, Ok(Ok(())))
                && let Some(flight) = self.flights.remove(&id)
            {
                flight.send(Progress::Failed(Failure::Panicked(reason.clone())));
                self.totals.n_failed += 1;
            }
        }
    }

    fn make_engine(&mut self) {
        self.last_restart = Instant::now();
        let health = match guarded(&mut self.factory) {
            Ok(engine) => {
                self.engine = Some(engine);
                Health::Ok
            }
            Err(error) => {
                tracing::error!(%error, "the engine could not be made again");
                Health::Down(error.to_string())
            }
        };
        self.health.send_if_modified(|current| set_unless_stopping(current, health));
    }

    fn status(&mut self) -> EngineStatus {
        let mut status =
            EngineStatus { counters: self.past.clone(), totals: self.totals.clone(), ..Default::default() };
        if let Some(engine) = &mut self.engine {
            status.cache = engine.cache_usage();
            add(&mut status.counters, engine.counters());
            status.n_waiting = engine.n_waiting();
            let n_kept: Vec<usize> = (0..engine.config().n_slot).map(|slot| engine.n_kept(slot)).collect();
            let look = |status: SlotStatus| {
                let flight = status.request.and_then(|id| self.flights.get(&id));
                SlotLook {
                    n_kept: n_kept[status.id],
                    n_cached: flight.map_or(0, |f| f.n_cached),
                    settings: flight.map(|f| f.settings.clone()),
                    status,
                }
            };
            status.slots = engine.slots().into_iter().map(look).collect();
            let usage = engine.usage();
            (status.memory_bytes, status.n_page, status.n_page_max) =
                (usage.bytes, usage.n_page, usage.n_page_max);
            let drafters = engine.drafters();
            let names: Vec<&str> = drafters.iter().map(|drafter| drafter.name()).collect();
            let awake = drafters.iter().map(|drafter| drafter.state_bytes() - drafter.resting_bytes());
            status.drafter = (!names.is_empty())
                .then(|| DrafterStatus { name: names.join(","), state_bytes: awake.sum() });
        }
        status
    }
}

/// One line per answer; a drafter that is loaded but of no use is worth a warning.
fn log_done(id: RequestId, stats: &Stats, timings: &Timings) {
    for (drafter, reason) in &stats.dropped {
        tracing::warn!(request = id.0, drafter, %reason, "the drafter's output was unusable: this request went on without");
    }
    if stats.speculation == SpeculationNote::Useless {
        tracing::warn!(request = id.0, n_draft = stats.n_draft, "not one drafted token was accepted");
    }
    tracing::info!(
        request = id.0,
        n_prompt = stats.n_prompt,
        n_cached = stats.n_cached,
        n_predicted = stats.n_predicted,
        prompt_ms = timings.prompt_ms,
        predicted_ms = timings.predicted_ms,
        n_draft = stats.n_draft,
        n_accepted = stats.n_accepted,
        "answered"
    );
}

fn set_unless_stopping(health: &mut Health, new: Health) -> bool {
    let set = *health != Health::ShuttingDown;
    if set {
        *health = new;
    }
    set
}

fn add(sum: &mut Counters, more: &Counters) {
    sum.n_step += more.n_step;
    sum.n_row += more.n_row;
    sum.n_lane += more.n_lane;
    sum.n_tokens_max = sum.n_tokens_max.max(more.n_tokens_max);
    sum.drafts.0 += more.drafts.0;
    sum.drafts.1 += more.drafts.1;
    sum.drafts.2 += more.drafts.2;
    if sum.accepted_by_position.len() < more.accepted_by_position.len() {
        sum.accepted_by_position.resize(more.accepted_by_position.len(), 0);
    }
    for (sum, more) in sum.accepted_by_position.iter_mut().zip(&more.accepted_by_position) {
        *sum += more;
    }
    sum.n_bad_logits += more.n_bad_logits;
    sum.n_bad_drafts += more.n_bad_drafts;
    sum.n_parked += more.n_parked;
    sum.times.draft += more.times.draft;
    sum.times.verify += more.times.verify;
    sum.times.commit += more.times.commit;
}
