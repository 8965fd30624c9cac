//! Who drafts for a slot, and how much: the drafter and the length that gain most for what they cost, or nothing.
//!
//! A draft of `k` tokens by drafter `d` is expected to gain `E = a₀ + a₀a₁ + … ` accepted tokens, `aᵢ` being how often
//! `d`'s token `i` was accepted in this slot where those before it were. With `m` slots decoding, a step costs
//!
//! ```text
//! plain      verify(m)                          gains 1 token a slot
//! drafting   verify(m·(1 + k)) + draft(d, k)    gains 1 + E
//! ```
//!
//! each slot reckoning as if the others did as it does. What wins per second is done. Both costs are measured as the
//! engine runs ([`Pace`]); a cost that was never measured counts as nothing more than its cheaper neighbour, so that
//! it gets measured.
//!
//! **The bound.** Estimates can be wrong, so what drafts may lose is limited whatever they say. A slot has a purse of
//! [`ALLOWANCE`] plain tokens' time; a draft that gains less than it cost takes the difference out, one that gains more
//! puts it in, up to the allowance; with an empty purse nothing is drafted on the strength of estimates. Drafts that the
//! estimates advise against, which are how a slot finds out that things have changed, are paid from [`PROBING`] of the
//! time that plain decoding takes. So no request takes longer than without drafts by more than
//!
//! ```text
//! ALLOWANCE tokens  +  one draft  +  PROBING of its time  (+ what keeping the drafters informed costs)
//! ```
//!
//! as far as the time of a plain step is known: it is measured before the first draft, and again every so often.
//!
//! Without a clock there are no costs: the drafter with the largest `E` drafts at full length, and every
//! [`TURN`]-th time the one that was asked longest ago.

use std::time::Duration;

/// Plain tokens' time that drafts may lose a request before they must pay for themselves.
pub(crate) const ALLOWANCE: f64 = 8.0;
/// Share of plain decoding's time that may go into drafts that are expected to lose.
pub(crate) const PROBING: f64 = 0.03;
/// Expected gain in speed below which drafting is not worth the trouble.
const MARGIN: f64 = 1.02;
/// Of so many drafts one is by another drafter, or longer than seems best.
const TURN: u32 = 16;
/// Plain steps that are measured before the first draft.
const N_FIRST: u32 = 3;
/// Steps after which the cost of a plain step is measured anew; at first sooner.
const REMEASURE: u32 = 256;
/// Weight of the newest observation of an acceptance, once there are some.
const NEWEST: f32 = 0.1;
/// Acceptance of a token before anything is known.
const PRIOR: f32 = 0.8;
/// Most rows whose cost is told apart.
const N_ROW: usize = 256;

/// How often a drafter's tokens were accepted, by position, where all before were.
#[derive(Clone, Debug)]
struct Acceptance {
    rate: Vec<f32>,
    n_seen: Vec<u32>,
}

impl Acceptance {
    fn new(n_draft_max: usize) -> Acceptance {
        Acceptance { rate: vec![PRIOR; n_draft_max], n_seen: vec![0; n_draft_max] }
    }

    fn observe(&mut self, n_draft: usize, n_accepted: usize) {
        for i in 0..n_draft.min(n_accepted + 1).min(self.rate.len()) {
            // A mean at first, in which the prior counts as two, then a moving one.
            let weight = (1.0 / (self.n_seen[i] as f32 + 3.0)).max(NEWEST);
            let accepted = if i < n_accepted { 1.0 } else { 0.0 };
            self.rate[i] += weight * (accepted - self.rate[i]);
            self.n_seen[i] = self.n_seen[i].saturating_add(1);
        }
    }

    /// Accepted tokens that a draft of each length `1..=n` is expected to give.
    fn expected(&self, n: usize) -> impl Iterator<Item = f64> {
        let gain = |(survives, sum): &mut (f64, f64), rate: &f32| {
            *survives *= f64::from(*rate);
            *sum += *survives;
            Some(*sum)
        };
        self.rate.iter().take(n).scan((1.0, 0.0), gain)
    }
}

/// Costs by some number (of rows, of drafted tokens), as measured.
#[derive(Debug)]
struct Curve {
    /// Seconds, and how often they were measured.
    at: Vec<(f64, u32)>,
}

impl Curve {
    fn new(n: usize) -> Curve {
        Curve { at: vec![(0.0, 0); n + 1] }
    }

    fn record(&mut self, n: usize, seconds: f64) {
        let Some((mean, count)) = self.at.get_mut(n) else { return };
        // What a machine does beside, cold caches and pages touched first make a step slower and never faster.
        let weight = match *count {
            0 => 1.0,
            _ if seconds < *mean => 0.5,
            _ => 0.1,
        };
        let seconds = if *count > 0 { seconds.min(4.0 * *mean) } else { seconds };
        *mean += weight * (seconds - *mean);
        *count = count.saturating_add(1);
    }

    /// As measured at exactly this number.
    fn measured(&self, n: usize) -> Option<f64> {
        self.at.get(n).filter(|(_, count)| *count > 0).map(|(mean, _)| *mean)
    }

    /// Between measured neighbours on a line, beyond the last one as much as there; none if nothing was measured.
    fn estimate(&self, n: usize) -> Option<f64> {
        let n = n.min(self.at.len() - 1);
        let below = (0..=n).rev().find_map(|i| Some((i, self.measured(i)?)));
        let above = (n..self.at.len()).find_map(|i| Some((i, self.measured(i)?)));
        match (below, above) {
            (Some((i, a)), Some((j, b))) if i < j => Some(a + (b - a) * (n - i) as f64 / (j - i) as f64),
            (Some((_, cost)), _) | (None, Some((_, cost))) => Some(cost),
            (None, None) => None,
        }
    }
}

/// What steps and drafts cost here; the engine's, for all slots.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Costs, if there is a clock to measure them.
    verify: Option<Curve>,
    /// By drafter, a call by its longest draft.
    draft: Vec<Curve>,
    /// Acceptance by drafter over all requests: what a new one begins with.
    acceptance: Vec<Acceptance>,
    /// Seconds that may go into drafts that are expected to lose.
    earned: f64,
    n_plan: u32,
    /// For each number of lanes, when its plain step was measured last.
    measured_at: Vec<u32>,
}

/// What a slot shall do in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Draft so many tokens with this drafter.
    Draft { drafter: usize, n_draft: usize },
    /// Nothing, so that the cost of a plain step becomes known.
    Measure,
    /// Nothing, because nothing pays.
    Rest,
}

/// A slot's side of it.
#[derive(Clone, Debug)]
pub(crate) struct Chooser {
    tracks: Vec<Track>,
    n_draft: u32,
    /// Seconds that drafts may still lose; none until the cost of a step is known.
    purse: Option<f64>,
    /// Seconds that were paid in advance for the draft that is out, because estimates advised against it.
    paid: f64,
}

#[derive(Clone, Debug)]
struct Track {
    is_alive: bool,
    acceptance: Acceptance,
    /// The slot's count of drafts when this one was asked last.
    asked_at: u32,
}

/// What a slot's draft came to in one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub drafter: usize,
    pub n_draft: usize,
    pub n_accepted: usize,
}

impl Pace {
    /// For drafters of at most so many tokens; `has_clock` if steps will be timed.
    pub fn new(n_draft_max: &[usize], has_clock: bool) -> Pace {
        Pace {
            verify: has_clock.then(|| Curve::new(N_ROW)),
            draft: n_draft_max.iter().map(|&n| Curve::new(n)).collect(),
            acceptance: n_draft_max.iter().map(|&n| Acceptance::new(n)).collect(),
            earned: 0.0,
            n_plan: 0,
            measured_at: vec![0; N_ROW + 1],
        }
    }

    /// True if costs count.
    pub fn is_timed(&self) -> bool {
        self.verify.is_some()
    }

    /// A slot's chooser for a new request.
    pub fn chooser(&self) -> Chooser {
        // What others found is where to begin, not what is known here.
        let begin = |acceptance: &Acceptance| Acceptance {
            rate: acceptance.rate.clone(),
            n_seen: acceptance.n_seen.iter().map(|&n| n.min(4)).collect(),
        };
        let track = |a: &Acceptance| Track { is_alive: true, acceptance: begin(a), asked_at: 0 };
        let tracks = self.acceptance.iter().map(track).collect();
        Chooser { tracks, n_draft: 0, purse: None, paid: 0.0 }
    }

    /// Begins a step in which `m` slots decode. True if it must be plain, to learn what that costs.
    pub fn begin(&mut self, m: usize) -> bool {
        self.n_plan = self.n_plan.wrapping_add(1);
        let Some(verify) = &self.verify else { return false };
        let Some((_, count)) = verify.at.get(m) else { return true };
        let due = (1u32 << count.min(&8)).min(REMEASURE);
        *count < N_FIRST || self.n_plan.wrapping_sub(self.measured_at[m]) >= due
    }

    /// A call of a drafter whose longest draft was asked for `n_draft` tokens.
    pub fn record_draft(&mut self, drafter: usize, n_draft: usize, time: Duration) {
        if self.is_timed() {
            self.draft[drafter].record(n_draft, time.as_secs_f64());
        }
    }

    /// A target forward of `n_rows` rows for `m` slots, all of which decode.
    pub fn record_verify(&mut self, n_rows: usize, m: usize, time: Duration) {
        let Some(verify) = &mut self.verify else { return };
        verify.record(n_rows, time.as_secs_f64());
        if n_rows == m && m <= N_ROW {
            self.measured_at[m] = self.n_plan;
        }
    }

    /// Seconds of a plain step of `m` slots, as far as known.
    fn plain(&self, m: usize) -> Option<f64> {
        self.verify.as_ref().and_then(|verify| verify.measured(m))
    }

    /// Settles a step of `m` slots that took `n_rows` rows: `time` is what drafting and forward took in all, or none
    /// if it had other work to do too and must be reckoned.
    pub fn settle(
        &mut self,
        m: usize,
        n_rows: usize,
        time: Option<Duration>,
        outcomes: &mut dyn Iterator<Item = (&mut Chooser, Outcome)>,
    ) {
        let costs = self.plain(m).map(|plain| {
            let reckoned = || self.verify.as_ref().and_then(|v| v.estimate(n_rows)).unwrap_or(plain);
            let time = time.map_or_else(reckoned, |time| time.as_secs_f64());
            let (token, n_extra) = (plain / m as f64, n_rows.saturating_sub(m).max(1));
            (token, (time - plain).max(0.0) / n_extra as f64)
        });
        for (chooser, outcome) in outcomes {
            let Outcome { drafter, n_draft, n_accepted } = outcome;
            self.acceptance[drafter].observe(n_draft, n_accepted);
            chooser.tracks[drafter].acceptance.observe(n_draft, n_accepted);
            if let Some((token, per_row)) = costs {
                let gain = n_accepted as f64 * token - n_draft as f64 * per_row;
                // Dearer than it seemed: nothing is tried again until that is earned too.
                self.earned -= chooser.settle(gain, ALLOWANCE * token);
                self.earn(n_accepted as f64 * token, token);
            }
            chooser.paid = 0.0;
        }
        if let Some((token, _)) = costs {
            self.earn(m as f64 * token, token);
        }
    }

    /// So much time was spent, or would have been without drafts. What is saved up ends somewhere.
    fn earn(&mut self, seconds: f64, token: f64) {
        self.earned = (self.earned + PROBING * seconds).min(2.0 * ALLOWANCE * token);
    }
}

/// A draft that could be made.
#[derive(Clone, Copy)]
struct Candidate {
    drafter: usize,
    n_draft: usize,
    /// Expected tokens per second, or per step without a clock.
    rate: f64,
    /// Seconds that are lost if nothing of it is accepted and nobody else drafts.
    at_stake: f64,
}

impl Chooser {
    /// True while drafter `i` knows this slot's sequence.
    pub fn is_alive(&self, i: usize) -> bool {
        self.tracks[i].is_alive
    }

    /// Drafters, dropped ones included.
    pub fn n_drafter(&self) -> usize {
        self.tracks.len()
    }

    /// Drafter `i` is no longer for this slot. False if that was the last one.
    pub fn drop_drafter(&mut self, i: usize) -> bool {
        self.tracks[i].is_alive = false;
        self.tracks.iter().any(|track| track.is_alive)
    }

    /// What to do in a step of `m` decoding slots where a draft may have `room` tokens. `asked` are the drafters that
    /// were asked in this step already and had nothing.
    pub fn choose(&mut self, pace: &mut Pace, m: usize, room: usize, asked: &[bool]) -> Choice {
        let is_open = |i: usize| self.tracks[i].is_alive && !asked[i];
        let open: Vec<usize> = (0..self.tracks.len()).filter(|&i| is_open(i)).collect();
        let best_of = |i: usize| self.best_length(pace, m, i, room);
        let candidates: Vec<Candidate> = open.iter().filter_map(|&i| best_of(i)).collect();
        let Some(best) = candidates.iter().copied().reduce(|a, b| if b.rate > a.rate { b } else { a }) else {
            return Choice::Rest;
        };
        let Some(plain) = pace.plain(m) else {
            return if pace.is_timed() { Choice::Measure } else { self.by_acceptance(best, &candidates) };
        };
        let purse = *self.purse.get_or_insert(ALLOWANCE * plain / m as f64);
        let pays = best.rate > MARGIN * m as f64 / plain;
        let is_turn = self.n_draft % TURN == TURN - 1;
        if pays && purse > 0.0 && !is_turn {
            return self.ask(best, 0.0);
        }
        // Another drafter, or more of this one, or anything at all: paid from what was saved up.
        let stalest =
            candidates.iter().copied().min_by_key(|c| self.tracks[c.drafter].asked_at).unwrap_or(best);
        let other = if pays && stalest.drafter == best.drafter {
            self.candidate(pace, m, best.drafter, room.min(pace.draft[best.drafter].at.len() - 1))
                .unwrap_or(best)
        } else {
            stalest
        };
        if other.at_stake <= pace.earned {
            pace.earned -= other.at_stake;
            return self.ask(other, other.at_stake);
        }
        if pays && purse > 0.0 { self.ask(best, 0.0) } else { Choice::Rest }
    }

    fn by_acceptance(&mut self, best: Candidate, candidates: &[Candidate]) -> Choice {
        let stalest =
            candidates.iter().copied().min_by_key(|c| self.tracks[c.drafter].asked_at).unwrap_or(best);
        let is_turn = self.n_draft % TURN == TURN - 1;
        self.ask(if is_turn { stalest } else { best }, 0.0)
    }

    fn ask(&mut self, candidate: Candidate, paid: f64) -> Choice {
        self.n_draft = self.n_draft.wrapping_add(1);
        self.tracks[candidate.drafter].asked_at = self.n_draft;
        self.paid = paid;
        Choice::Draft { drafter: candidate.drafter, n_draft: candidate.n_draft }
    }

    /// Drafter `i` at the length that suits it best; at full length without a clock.
    fn best_length(&self, pace: &Pace, m: usize, i: usize, room: usize) -> Option<Candidate> {
        let n_max = room.min(pace.draft[i].at.len() - 1);
        if !pace.is_timed() {
            return self.candidate(pace, m, i, n_max);
        }
        let all = (1..=n_max).filter_map(|n| self.candidate(pace, m, i, n));
        all.reduce(|a, b| if b.rate > a.rate { b } else { a })
    }

    fn candidate(&self, pace: &Pace, m: usize, i: usize, n_draft: usize) -> Option<Candidate> {
        let gain = 1.0 + self.tracks[i].acceptance.expected(n_draft).last()?;
        let (Some(plain), Some(verify)) = (pace.plain(m), &pace.verify) else {
            return Some(Candidate { drafter: i, n_draft, rate: gain, at_stake: 0.0 });
        };
        let forward = |n_rows| verify.estimate(n_rows).map_or(plain, |cost| cost.max(plain));
        let call = pace.draft[i].estimate(n_draft).unwrap_or(0.0);
        let rate = gain * m as f64 / (forward(m * (1 + n_draft)) + call);
        let at_stake = forward(m + n_draft) + call - plain;
        Some(Candidate { drafter: i, n_draft, rate, at_stake })
    }

    /// Takes a gain or a loss into the purse. A draft that was paid in advance costs the purse nothing: what it lost
    /// beyond its price is returned.
    fn settle(&mut self, gain: f64, most: f64) -> f64 {
        if gain < 0.0 && self.paid > 0.0 {
            return -(gain + self.paid).min(0.0);
        }
        if let Some(purse) = &mut self.purse {
            *purse = (*purse + gain).min(most);
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which things cost what they are said to, and drafters that are as good as they are said to be.
    struct World {
        pace: Pace,
        slots: Vec<Chooser>,
        seconds: f64,
        n_token: usize,
        /// Drafts by drafter, and tokens in them.
        drafts: Vec<(usize, usize)>,
        /// How much more every other forward with drafts takes than it should.
        spike: f64,
        noise: u64,
    }

    /// Seconds of a forward of so many rows.
    type Verify = fn(usize) -> f64;

    /// Nearly flat, as where weights are read from memory.
    fn flat(n: usize) -> f64 {
        0.010 + 0.0004 * n as f64
    }

    /// Each row as much as the first, as where everything is in the cache.
    fn steep(n: usize) -> f64 {
        0.010 * n as f64
    }

    impl World {
        fn new(n_draft_max: &[usize], n_slot: usize) -> World {
            let pace = Pace::new(n_draft_max, true);
            World {
                slots: (0..n_slot).map(|_| pace.chooser()).collect(),
                drafts: vec![(0, 0); n_draft_max.len()],
                pace,
                seconds: 0.0,
                n_token: 0,
                spike: 1.0,
                noise: 7,
            }
        }

        fn chance(&mut self, p: f64) -> bool {
            self.noise = self.noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.noise >> 40) as f64 / (1u64 << 24) as f64) < p
        }

        /// One step of all slots; `truth` is each drafter's `(chance that a token is accepted, seconds of a call)`.
        fn step(&mut self, verify: Verify, truth: &[(f64, f64)]) {
            let m = self.slots.len();
            let mut choices = vec![Choice::Measure; m];
            if !self.pace.begin(m) {
                for (slot, choice) in self.slots.iter_mut().zip(&mut choices) {
                    *choice = slot.choose(&mut self.pace, m, 64, &vec![false; truth.len()]);
                }
            }
            let mut time = 0.0;
            for (d, (_, seconds)) in truth.iter().enumerate() {
                let lengths = choices.iter().filter_map(|c| match c {
                    Choice::Draft { drafter, n_draft } if *drafter == d => Some(*n_draft),
                    _ => None,
                });
                if let Some(longest) = lengths.max() {
                    self.pace.record_draft(d, longest, Duration::from_secs_f64(*seconds));
                    time += seconds;
                }
            }
            let (mut n_rows, mut outcomes) = (m, vec![None; m]);
            for (slot, choice) in choices.iter().enumerate() {
                self.n_token += 1;
                let Choice::Draft { drafter, n_draft } = *choice else { continue };
                n_rows += n_draft;
                let n_accepted = (0..n_draft).take_while(|_| self.chance(truth[drafter].0)).count();
                self.n_token += n_accepted;
                self.drafts[drafter].0 += 1;
                self.drafts[drafter].1 += n_draft;
                outcomes[slot] = Some(Outcome { drafter, n_draft, n_accepted });
            }
            let is_dear = n_rows > m && self.drafts.iter().map(|(n, _)| n).sum::<usize>() % 2 == 0;
            let forward = verify(n_rows) * if is_dear { self.spike } else { 1.0 };
            self.pace.record_verify(n_rows, m, Duration::from_secs_f64(forward));
            time += forward;
            self.seconds += time;
            let mut settled = self.slots.iter_mut().zip(outcomes).filter_map(|(s, o)| Some((s, o?)));
            self.pace.settle(m, n_rows, Some(Duration::from_secs_f64(time)), &mut settled);
        }

        /// What the same tokens cost without drafts.
        fn plain(&self, verify: Verify) -> f64 {
            let m = self.slots.len();
            verify(m) / m as f64 * self.n_token as f64
        }

        /// The bound that the module promises, whatever the drafters do. `dearest` is one draft of all slots.
        fn check_bound(&self, verify: Verify, dearest: f64) {
            let plain = self.plain(verify);
            let m = self.slots.len() as f64;
            let most = plain * (1.0 + PROBING) + ALLOWANCE * verify(self.slots.len()) + m * dearest;
            assert!(self.seconds <= most * 1.001, "{} seconds, plain {plain}, at most {most}", self.seconds);
        }
    }

    #[test]
    fn a_drafter_that_never_helps_is_turned_off() {
        for (verify, m) in [(flat as Verify, 1), (flat, 4), (steep, 1), (steep, 8)] {
            let mut world = World::new(&[15], m);
            (0..2000).for_each(|_| world.step(verify, &[(0.0, 0.004)]));
            world.check_bound(verify, verify(16 * m) + 0.004 - verify(m));
            let (n, _) = world.drafts[0];
            assert!(n >= 5 && n < 2000 * m / 5, "{n} drafts in {} steps", 2000 * m);
            let before = world.drafts[0].0;
            (0..1000).for_each(|_| world.step(verify, &[(0.0, 0.004)]));
            let late = world.drafts[0].0 - before;
            assert!(late > 0 && late < 1000 * m / 8, "{late} probes in {} steps", 1000 * m);
        }
    }

    #[test]
    fn a_drafter_comes_back_when_it_helps() {
        let mut world = World::new(&[7], 1);
        (0..1000).for_each(|_| world.step(flat, &[(0.0, 0.004)]));
        let (asleep, began) = (world.drafts[0].0, world.seconds);
        let n_token = world.n_token;
        (0..1000).for_each(|_| world.step(flat, &[(0.9, 0.004)]));
        assert!(world.drafts[0].0 - asleep > 700, "{} drafts of 1000", world.drafts[0].0 - asleep);
        let rate = (world.n_token - n_token) as f64 / (world.seconds - began);
        assert!(rate > 2.0 / flat(1), "{rate} tokens a second, plain {}", 1.0 / flat(1));
    }

    #[test]
    fn a_good_one_is_used_at_full_length() {
        let mut world = World::new(&[7], 1);
        (0..1000).for_each(|_| world.step(flat, &[(0.97, 0.004)]));
        let (n, tokens) = world.drafts[0];
        assert!(
            n > 950 && tokens as f64 > 6.8 * n as f64,
            "{n} drafts of {} tokens",
            tokens as f64 / n as f64
        );
        assert!(world.seconds < world.plain(flat) / 3.0);
    }

    #[test]
    fn length_follows_price_and_acceptance() {
        let mean = |verify: Verify, p: f64| {
            let mut world = World::new(&[15], 1);
            (0..2000).for_each(|_| world.step(verify, &[(p, 0.001)]));
            world.check_bound(verify, verify(16) + 0.001 - verify(1));
            world.drafts[0].1 as f64 / world.drafts[0].0 as f64
        };
        let (cheap, dear): (Verify, Verify) = (flat, |n| 0.010 + 0.004 * (n - 1) as f64);
        assert!(mean(cheap, 0.95) > 10.0);
        assert!((2.0..9.0).contains(&mean(cheap, 0.6)), "{}", mean(cheap, 0.6));
        assert!(mean(dear, 0.6) < 3.0, "{}", mean(dear, 0.6));
    }

    /// Whoever helps most for its price is used: first a dear good one, then a cheap one that has become as good.
    #[test]
    fn the_better_of_two_is_used() {
        let mut world = World::new(&[7, 7], 2);
        (0..1000).for_each(|_| world.step(flat, &[(0.8, 0.004), (0.2, 0.0001)]));
        let first = world.drafts.clone();
        assert!(first[0].0 > 10 * first[1].0 && first[1].0 > 0, "{first:?}");
        (0..1000).for_each(|_| world.step(flat, &[(0.8, 0.004), (0.8, 0.0001)]));
        assert!(world.drafts[1].0 - first[1].0 > 2 * (world.drafts[0].0 - first[0].0), "{:?}", world.drafts);
    }

    /// A drafter that is good until it is trusted, and bad from then on, again and again.
    #[test]
    fn nobody_loses_more_than_is_promised() {
        for period in [3, 10, 30, 100, 300] {
            for m in [1, 3] {
                let mut world = World::new(&[15], m);
                for i in 0..6000 {
                    let p = if (i / period) % 2 == 0 { 0.9 } else { 0.0 };
                    world.step(steep, &[(p, 0.020)]);
                }
                world.check_bound(steep, steep(16 * m) + 0.020 - steep(m));
            }
        }
    }

    /// Half of the forwards with drafts take eight times as long, which the estimates take for something that the machine
    /// did beside: the purse counts what was really spent.
    #[test]
    fn where_estimates_are_wrong_the_purse_ends_it() {
        let mut world = World::new(&[15], 1);
        world.spike = 8.0;
        (0..4000).for_each(|_| world.step(flat, &[(0.5, 0.002)]));
        world.check_bound(flat, 8.0 * flat(16) + 0.002 - flat(1));
    }

    #[test]
    fn without_a_clock_acceptance_decides_at_full_length() {
        let mut pace = Pace::new(&[7, 5], false);
        let mut slot = pace.chooser();
        let mut n_asked = [0, 0];
        for _ in 0..400 {
            assert!(!pace.begin(1));
            let Choice::Draft { drafter, n_draft } = slot.choose(&mut pace, 1, 6, &[false; 2]) else {
                panic!("there is always a draft")
            };
            assert_eq!(n_draft, [6, 5][drafter]);
            n_asked[drafter] += 1;
            let n_accepted = [1, 3][drafter];
            let mut settled = [(&mut slot, Outcome { drafter, n_draft, n_accepted })].into_iter();
            pace.settle(1, 1 + n_draft, None, &mut settled);
        }
        assert!(n_asked[1] > 300 && n_asked[0] >= 10, "{n_asked:?}");
        assert!(slot.drop_drafter(1), "one is left");
        let choice = slot.choose(&mut pace, 1, 6, &[false; 2]);
        assert_eq!(choice, Choice::Draft { drafter: 0, n_draft: 6 });
        assert_eq!(slot.choose(&mut pace, 1, 6, &[true, false]), Choice::Rest);
        assert!(!slot.drop_drafter(0), "none is left");
    }

    #[test]
    fn costs_between_measurements_are_on_a_line() {
        let mut curve = Curve::new(16);
        assert_eq!(curve.estimate(3), None);
        curve.record(2, 1.0);
        assert_eq!([1, 2, 9].map(|n| curve.estimate(n)), [Some(1.0); 3]);
        curve.record(10, 5.0);
        assert_eq!([2, 4, 10, 99].map(|n| curve.estimate(n)), [1.0, 2.0, 5.0, 5.0].map(Some));
        curve.record(99, 7.0);
        assert_eq!(curve.measured(99), None);
    }
}
