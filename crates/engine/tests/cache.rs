//! What is cached is exact or not offered: whoever asks gets the tokens, the drafts and the accept lengths of a cold start.

mod world;

use paceline_engine::{
    CacheConfig, CheckedSnapshot, Request, RequestId, RestoreError, Restored, SaveError, Stats,
};
use paceline_sampling::SamplingParams;
use paceline_spec::Draft;
use paceline_testkit::{Accept, Forks, HashKind, HashModel, Scripted, Token, oracle};
use world::{Sizes, World, shelf::Folder};

fn text(text: &str) -> Vec<Token> {
    text.bytes().map(Token::from).collect()
}

fn request(id: u64, prompt: Vec<Token>) -> Request {
    Request {
        n_predict: Some(20),
        ignore_eos: true,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ..Request::new(RequestId(id), prompt)
    }
}

/// Takes a file up as the server does: its checksum first.
fn restore(world: &mut World, slot: usize, bytes: &[u8]) -> Result<Restored, SaveError> {
    world.engine.restore(slot, &CheckedSnapshot::new(bytes.to_vec())?)
}

/// A drafter that is right more or less often, depending on the place alone.
fn drafter(model: &HashModel) -> Scripted {
    let mut right: Vec<Scripted> = (0..4).map(|n| oracle(model.clone(), 7, Accept::Exactly(n), 1)).collect();
    Scripted::new("by place", 7, move |tokens, request| -> Draft {
        right[tokens.len() % 4].answer(tokens, request)
    })
}

fn world(kind: HashKind, forks: Forks, sizes: Sizes) -> World {
    let model = HashModel::new(5, kind);
    World::new(model.clone(), Some(drafter(&model).forking(forks)), sizes)
}

/// Runs the request alone in a world that knows nothing, and says what its answer took.
fn cold(kind: HashKind, forks: Forks, request: Request) -> (Vec<Token>, Stats) {
    let id = request.id;
    let mut world = world(kind, forks, Sizes::COLD);
    world.submit(request).unwrap();
    world.run();
    let told = world.told.remove(&id).unwrap();
    (told.ids(), told.stats)
}

/// Runs the rounds, each one's requests at once; all must get what they get cold. Returns the cached tokens of each.
fn check(kind: HashKind, forks: Forks, sizes: Sizes, rounds: Vec<Vec<Request>>) -> Vec<Vec<usize>> {
    let mut world = world(kind, forks, sizes);
    let mut n_cached = Vec::new();
    for round in rounds {
        let ids: Vec<RequestId> = round.iter().map(|request| request.id).collect();
        round.into_iter().for_each(|request| world.submit(request).unwrap());
        world.run();
        n_cached.push(ids.iter().map(|id| world.told[id].n_cached).collect());
    }
    for (id, told) in &world.told {
        let (ids, stats) = cold(kind, forks, world.requests[id].clone());
        let warm = Stats { n_cached: 0, ..told.stats.clone() };
        assert_eq!((told.ids(), warm), (ids, stats), "{id:?}, {kind:?}, {forks:?}");
    }
    world.check();
    n_cached
}

/// One request per round.
fn in_turn(prompts: impl IntoIterator<Item = Vec<Token>>) -> Vec<Vec<Request>> {
    prompts.into_iter().enumerate().map(|(id, prompt)| vec![request(id as u64, prompt)]).collect()
}

const PAST: &str = "once there was a cat, and it sat on a mat, and then it ran far away, because";

#[test]
fn identical_prompts_are_computed_once() {
    let n = PAST.len();
    for n_slot in [1, 2, 4, 8] {
        let sizes = Sizes { n_slot, ..Sizes::ROOMY };
        for kind in HashKind::ALL {
            for forks in [Forks::Anywhere, Forks::Whole] {
                let got = check(kind, forks, sizes, in_turn((0..5).map(|_| text(PAST))));
                assert_eq!(got.concat(), [0, n - 1, n - 1, n - 1, n - 1], "{kind:?} {forks:?}");
            }
        }
    }
}

#[test]
fn a_drafter_that_cannot_fork_is_not_left_behind() {
    let plain = |id| Request { n_draft_max: Some(0), ..request(id, text(PAST)) };
    for kind in HashKind::ALL {
        let rounds =
            vec![vec![request(0, text(PAST))], vec![request(1, text(PAST))], vec![plain(2)], vec![plain(3)]];
        let got = check(kind, Forks::Never, Sizes::ROOMY, rounds).concat();
        assert_eq!(got, [0, 0, 0, PAST.len() - 1], "{kind:?}: who does not draft needs no drafter's part");
        // And the other way round: what was computed without the drafter does not serve who drafts.
        let rounds =
            vec![vec![plain(0)], vec![request(1, text(PAST))], vec![plain(2)], vec![request(3, text(PAST))]];
        let got = check(kind, Forks::Anywhere, Sizes::ROOMY, rounds).concat();
        assert_eq!(got, [0, 0, PAST.len() - 1, PAST.len() - 1], "{kind:?}");
    }
}

#[test]
fn who_asks_for_no_cache_neither_takes_nor_leaves() {
    let uncached = |id| Request { cache_prompt: false, ..request(id, text(PAST)) };
    for kind in HashKind::ALL {
        let rounds = vec![vec![uncached(0)], vec![request(1, text(PAST))], vec![uncached(2)]];
        assert_eq!(check(kind, Forks::Anywhere, Sizes::ROOMY, rounds).concat(), [0, 0, 0]);
        let off = check(kind, Forks::Anywhere, Sizes::COLD, in_turn([text(PAST), text(PAST)]));
        assert_eq!(off.concat(), [0, 0]);
    }
}

/// The next turn of a chat, as far as its prompt can be told: with the answer, or with another one in its place.
#[test]
fn the_next_turn_goes_on_where_the_last_one_was() {
    for kind in HashKind::ALL {
        let first = request(0, text(PAST));
        let (answer, _) = cold(kind, Forks::Anywhere, first.clone());
        let whole = [&text(PAST)[..], &answer, &text("and?")].concat();
        // The answer's last token was never computed.
        let got =
            check(kind, Forks::Anywhere, Sizes::ROOMY, vec![vec![first.clone()], vec![request(1, whole)]]);
        assert_eq!(got.concat(), [0, PAST.len() + answer.len() - 1], "{kind:?}");

        // A template that drops thoughts: the answer is another text, and the opening of the last one is not there.
        let opening = PAST.len() - 7;
        let turns = |r: Request| Request { turns: vec![20, opening], ..r };
        let dropped = [&text(PAST)[..opening], &text("as was said before, and now?")].concat();
        let edited = [&text(PAST)[..20], &text("something else")].concat();
        let rounds = vec![vec![turns(first)], vec![request(1, dropped)], vec![request(2, edited)]];
        assert_eq!(check(kind, Forks::Anywhere, Sizes::ROOMY, rounds).concat(), [0, opening, 20], "{kind:?}");
    }
}

#[test]
fn shrinking_prompts() {
    let long: String = PAST.repeat(2);
    for kind in HashKind::ALL {
        for n_slot in [1, 2, 4, 8] {
            let sizes = Sizes { n_slot, ..Sizes::ROOMY };
            let lens = [150, 149, 120, 97, 96, 50, 25, 24, 3, 1];
            let got = check(kind, Forks::Anywhere, sizes, in_turn(lens.map(|n| text(&long[..n])))).concat();
            for (n, n_cached) in lens.into_iter().zip(got).skip(1) {
                // A recurrent state can be entered at every 24th token, and one before the end of each prompt so far.
                let want = if kind == HashKind::Attention { n - 1 } else { (n - 1) / 24 * 24 };
                assert!((want..n).contains(&n_cached), "{kind:?}: {n_cached} of {n}");
            }
        }
    }
}

/// Where two prompts have parted a third one finds a snapshot.
#[test]
fn prompts_that_part_where_others_did() {
    let common = &PAST[..40];
    let prompt = |end: &str| [text(common), text(end)].concat();
    let sizes = Sizes { cache: CacheConfig { n_step: 0, ..Sizes::ROOMY.cache }, ..Sizes::ROOMY };
    let prompts = ["one end", "some other", "yet another", "yes"].map(prompt);
    for kind in [HashKind::Recurrent, HashKind::Hybrid] {
        let got = check(kind, Forks::Anywhere, sizes, in_turn(prompts.clone())).concat();
        assert_eq!(got, [0, 0, 40, 40], "{kind:?}");
    }
    assert_eq!(
        check(HashKind::Attention, Forks::Anywhere, sizes, in_turn(prompts)).concat(),
        [0, 40, 40, 42]
    );
}

/// Those that start together compute each their own; who comes while another answers shares what is computed by then.
#[test]
fn interleaved_starts() {
    for kind in HashKind::ALL {
        for n_slot in [2, 4, 8] {
            let mut world = world(kind, Forks::Anywhere, Sizes { n_slot, ..Sizes::ROOMY });
            for id in 0..6 {
                world.submit(Request { n_predict: Some(40), ..request(id, text(PAST)) }).unwrap();
                (0..4).for_each(|_| _ = world.step());
            }
            world.run();
            let got: Vec<usize> = (0..6).map(|id| world.told[&RequestId(id)].n_cached).collect();
            assert!(
                got[0] == 0 && got[2..].iter().all(|&n| n == PAST.len() - 1),
                "{kind:?}, {n_slot}: {got:?}"
            );
            for told in world.told.values() {
                let (ids, stats) =
                    cold(kind, Forks::Anywhere, Request { n_predict: Some(40), ..request(0, text(PAST)) });
                assert_eq!((told.ids(), told.stats.n_verify), (ids, stats.n_verify));
            }
            world.check();
        }
    }
}

/// What is used stays, what is not goes, and the budget holds after every step.
#[test]
fn a_small_budget_keeps_what_is_used() {
    for kind in HashKind::ALL {
        // As many pages for each class.
        let n_byte_max = 12_000 * kind.windows().len().max(1);
        let cache = CacheConfig { n_byte_max, ..Sizes::ROOMY.cache };
        let mut world = world(kind, Forks::Anywhere, Sizes { cache, ..Sizes::ROOMY });
        for id in 0..60 {
            let prompt = if id % 3 == 0 { text(PAST) } else { text(&format!("{id} {PAST}")) };
            world.submit(request(id, prompt)).unwrap();
            while world.engine.has_work() {
                world.step();
                let cached = world.engine.cache_usage();
                assert!(cached.bytes <= n_byte_max, "{cached:?}");
            }
        }
        let cached = world.engine.cache_usage();
        assert!(cached.n_evicted > 20 && cached.n_snapshot > 0, "{kind:?}: {cached:?}");
        // Not to its end: a few tokens behind the last regular snapshot are cheaper to compute again than to keep.
        let is_kept = |i: &u64| world.told[&RequestId(3 * i)].n_cached >= 48;
        let n_kept = (1..20).filter(is_kept).count();
        assert!(n_kept >= 15, "{kind:?}: what is asked all the time was there {n_kept} of 19 times");
        world.check();
    }
}

/// As after a restart: another engine, another drafter, and nothing but the file.
#[test]
fn what_is_saved_can_be_restored_elsewhere() {
    for kind in HashKind::ALL {
        let first = Request { slot: Some(1), ..request(0, text(PAST)) };
        let mut before = world(kind, Forks::Anywhere, Sizes::ROOMY);
        before.submit(first.clone()).unwrap();
        before.step();
        assert_eq!(before.engine.save(1), Err(SaveError::Busy { slot: 1 }));
        before.run();
        let saved = before.engine.save(1).unwrap();
        let answer = before.told[&RequestId(0)].ids();
        assert_eq!(saved.n_token, PAST.len() + answer.len() - 1);
        assert!(matches!(before.engine.save(0), Err(SaveError::Empty { slot: 0, .. })));
        assert!(matches!(
            restore(&mut before, 7, &saved.bytes),
            Err(SaveError::BadSlot { slot: 7, n_slot: 2 })
        ));

        let mut after = world(kind, Forks::Anywhere, Sizes::ROOMY);
        // Whatever is wrong with a file, nothing changes.
        for n in [0, 5, 16, 40, saved.bytes.len() / 2, saved.bytes.len() - 1] {
            let mut bad = saved.bytes.clone();
            bad[n] ^= 0x40;
            for bad in [&bad[..], &saved.bytes[..n]] {
                assert!(matches!(restore(&mut after, 0, bad), Err(SaveError::Restore(_))), "{n}");
            }
        }
        let usage = after.engine.usage();
        assert_eq!((usage.n_resting, usage.bytes_resting, after.states.n_page()), (0, 0, 0));

        let restored = restore(&mut after, 0, &saved.bytes).unwrap();
        assert_eq!((restored.n_token, restored.serves_drafts), (saved.n_token, true));
        assert_eq!(after.engine.save(0).unwrap(), saved, "nothing is lost on the way");
        let next = request(1, [&text(PAST)[..], &answer, &text("and?")].concat());
        after.submit(next.clone()).unwrap();
        after.run();
        let told = after.told[&RequestId(1)].clone();
        assert_eq!(told.n_cached, saved.n_token);
        let warm = Stats { n_cached: 0, ..told.stats.clone() };
        assert_eq!((told.ids(), warm), cold(kind, Forks::Anywhere, next), "{kind:?}");
        assert_eq!(restore(&mut after, 0, &saved.bytes).unwrap(), restored, "again is no harm");
        let erased = after.engine.erase(0).unwrap();
        assert!(erased.n_token == saved.n_token && erased.n_snapshot > 0, "{erased:?}");
        assert!(matches!(after.engine.save(0), Err(SaveError::Empty { slot: 0, .. })));
        after.check();

        // Where it could not be used it is not taken.
        let small = CacheConfig { n_byte_max: 10, ..Sizes::ROOMY.cache };
        for cache in [CacheConfig::OFF, small] {
            let mut other = world(kind, Forks::Anywhere, Sizes { cache, ..Sizes::ROOMY });
            let error = restore(&mut other, 0, &saved.bytes).unwrap_err();
            assert!(matches!(error, SaveError::Restore(RestoreError::Useless(_))), "{error}");
            other.check();
        }
        // Another kind of model has other states.
        let kinds = HashKind::ALL.into_iter().filter(|&other| other != kind);
        for other in kinds {
            let mut other = world(other, Forks::Anywhere, Sizes::ROOMY);
            let error = restore(&mut other, 0, &saved.bytes).unwrap_err();
            assert!(matches!(error, SaveError::Restore(RestoreError::Damaged(_))), "{error}");
            other.check();
        }
    }
}

/// A drafter that has no form as bytes, or that is not there, does not keep the target's part from being saved.
#[test]
fn a_file_without_a_drafters_part_says_whom_it_serves() {
    let kind = HashKind::Hybrid;
    let mut before = World::new(HashModel::new(5, kind), None::<Scripted>, Sizes::ROOMY);
    before.submit(request(0, text(PAST))).unwrap();
    before.run();
    let saved = before.engine.save(0).unwrap();
    let mut after = world(kind, Forks::Anywhere, Sizes::ROOMY);
    assert!(!restore(&mut after, 1, &saved.bytes).unwrap().serves_drafts);
    let next = [&text(PAST)[..], &before.told[&RequestId(0)].ids(), &text("and?")].concat();
    after.submit(request(0, next.clone())).unwrap();
    after.submit(Request { n_draft_max: Some(0), ..request(1, next) }).unwrap();
    after.run();
    assert_eq!([0, 1].map(|id| after.told[&RequestId(id)].n_cached), [0, saved.n_token]);
    after.check();
}

/// Five requests with one prompt at once: the first computes it, the others begin where it was.
#[test]
fn prompts_that_come_together_are_computed_once() {
    let n = PAST.len();
    for kind in HashKind::ALL {
        for n_slot in [1, 2, 4, 8] {
            let sizes = Sizes { n_slot, ..Sizes::ROOMY };
            let five = (0..5).map(|id| request(id, text(PAST))).collect();
            let got = check(kind, Forks::Anywhere, sizes, vec![five]).concat();
            assert_eq!(got, [0, n - 1, n - 1, n - 1, n - 1], "{kind:?}, {n_slot} slots");
        }
        // With ends of their own, what they share is long enough to wait for; a short beginning is not.
        let ends = ["", " it", " is", " was so"].map(|end| text(&format!("{PAST}{end}")));
        let four = ends.iter().enumerate().map(|(id, prompt)| request(id as u64, prompt.clone())).collect();
        let got = check(kind, Forks::Anywhere, Sizes { n_slot: 4, ..Sizes::ROOMY }, vec![four]).concat();
        assert!(got[1..].iter().all(|&n_cached| n_cached >= n - 1), "{kind:?}: {got:?}");
        let short = &PAST[..40];
        let two = (0..2).map(|id| request(id, text(short))).collect();
        assert_eq!(check(kind, Forks::Anywhere, Sizes::ROOMY, vec![two]).concat(), [0, 0], "{kind:?}");
        // Nothing can be handed on where nothing is kept, or by one who does not want to, or has no drafter.
        let off = vec![(0..3).map(|id| request(id, text(PAST))).collect()];
        assert_eq!(check(kind, Forks::Anywhere, Sizes::COLD, off).concat(), [0, 0, 0], "{kind:?}");
        let plain = |id| Request { n_draft_max: Some(0), ..request(id, text(PAST)) };
        let uncached = |id| Request { cache_prompt: false, ..request(id, text(PAST)) };
        for first in [plain(0), uncached(0)] {
            let round = vec![vec![first, request(1, text(PAST))]];
            assert_eq!(check(kind, Forks::Anywhere, Sizes::ROOMY, round).concat(), [0, 0], "{kind:?}");
        }
    }
}

/// Who waits for another's prompt goes on when that one is cancelled, at any moment.
#[test]
fn nobody_waits_for_who_is_gone() {
    let long = text(&PAST.repeat(2));
    for kind in HashKind::ALL {
        for n_step in 0..8 {
            let mut world = world(kind, Forks::Anywhere, Sizes { n_slot: 4, ..Sizes::ROOMY });
            (0..3).for_each(|id| world.submit(request(id, long.clone())).unwrap());
            (0..n_step).for_each(|_| _ = world.step());
            world.cancel(RequestId(0));
            world.run();
            for id in [1, 2] {
                let (ids, _) = cold(kind, Forks::Anywhere, request(id, long.clone()));
                assert_eq!(world.told[&RequestId(id)].ids(), ids, "{kind:?}, after {n_step} steps");
            }
            world.check();
        }
    }
}

/// A budget for one prompt, a shelf for all: what was dropped comes back, in this life and the next one.
#[test]
fn what_has_no_room_lies_on_the_shelf() {
    let prompt = |i: u64| text(&format!("{i}: {PAST}{i}"));
    for kind in HashKind::ALL {
        for n_slot in [1, 2, 4, 8] {
            let folder = Folder::default();
            // Recurrent states are small.
            let n_byte_max = if kind == HashKind::Recurrent { 1000 } else { 6000 };
            let cache = CacheConfig { n_byte_max, ..Sizes::ROOMY.cache };
            let sizes = Sizes { n_slot, cache, ..Sizes::ROOMY };
            let new = |seed| world(kind, Forks::Anywhere, sizes).with_shelf(folder.shelf(seed, 0), 1 << 40);
            let mut first = new(1);
            let n_round = 3;
            for round in 0..n_round {
                for i in 0..6 {
                    first.submit(request(10 * round + i, prompt(i))).unwrap();
                }
                first.run();
            }
            let shelf = first.engine.cache_usage().shelf.unwrap();
            assert!(shelf.n_stored > 0 && shelf.n_fetched > 0, "{kind:?}, {n_slot} slots: {shelf:?}");
            first.engine.put_away();
            first.check();

            let mut second = new(2);
            assert_eq!(second.engine.cache_usage().shelf.unwrap().n_file, folder.n_file());
            for i in 0..6 {
                second.submit(request(i, prompt(i))).unwrap();
            }
            second.run();
            for i in 0..6 {
                let told = &second.told[&RequestId(i)];
                assert!(told.n_cached + 30 > prompt(i).len(), "{kind:?}, {i}: {} cached", told.n_cached);
                let warm = Stats { n_cached: 0, ..told.stats.clone() };
                assert_eq!(
                    (told.ids(), warm),
                    cold(kind, Forks::Anywhere, request(i, prompt(i))),
                    "{kind:?}"
                );
            }
            second.check();

            // Damaged ones are computed, once, and gone.
            folder.damage();
            let mut third = new(3);
            for i in 0..6 {
                third.submit(request(i, prompt(i))).unwrap();
            }
            third.run();
            let shelf = third.engine.cache_usage().shelf.unwrap();
            assert!(shelf.n_fetched == 0 && shelf.n_not_fetched >= 6, "{shelf:?}");
            assert_eq!(shelf.bytes, folder.bytes() as u64);
            third.check();
        }
    }
}

/// What a slot's conversation left is gone, from memory and shelf, and what others begin with is not.
#[test]
fn erased_is_forgotten() {
    for kind in HashKind::ALL {
        let folder = Folder::default();
        // Room for one of the two.
        let cache = CacheConfig { n_byte_max: 9000, ..Sizes::ROOMY.cache };
        let sizes = Sizes { n_slot: 2, cache, ..Sizes::ROOMY };
        let mut world = world(kind, Forks::Anywhere, sizes).with_shelf(folder.shelf(1, 0), 1 << 40);
        let system = "you are a cat that can talk, and this is the house where you live. ";
        let chat = |who: &str| text(&format!("{system}{who} {PAST}"));
        let ask = |world: &mut World, id: u64, slot, prompt: Vec<Token>| {
            let turns = vec![system.len()];
            world.submit(Request { slot: Some(slot), turns, ..request(id, prompt) }).unwrap();
            world.run();
            world.told[&RequestId(id)].n_cached
        };
        ask(&mut world, 0, 0, chat("one"));
        ask(&mut world, 1, 1, chat("two"));
        let kept = world.engine.n_kept(1);
        assert!(kept > system.len(), "{kind:?}: {kept}");
        assert!(world.engine.erase(0).unwrap().n_snapshot > 0);
        assert_eq!(world.engine.erase(0).unwrap().n_token, 0, "again there is nothing");
        let again = ask(&mut world, 2, 0, chat("one"));
        assert!(again <= system.len(), "{kind:?}: {again} tokens were left of what was erased");
        let other = ask(&mut world, 3, 1, chat("two"));
        assert!(other > system.len(), "{kind:?}: another conversation lost what it had, but for {other}");
        world.engine.erase(0).unwrap();
        world.engine.erase(1).unwrap();
        world.rest();
        assert_eq!((folder.n_file(), ask(&mut world, 4, 0, chat("two"))), (0, 0), "{kind:?}");
        world.check();
    }
}
