use super::*;
use crate::scene::{
    parse::parse,
    tabletop::{render::render, split::MOST, world::Item},
};
use std::collections::{BTreeMap, HashSet};

#[test]
fn samples_depend_on_their_key_alone() {
    let all = |index| {
        let t = text_to_image(4, Split::Train, index, 1, 3);
        let e = edit(4, Split::Train, index, 1, 3);
        let a = act(4, Split::Train, index, 1, 3);
        (t.prompt, t.scene, e.instruction, e.target, a.instruction, a.scene)
    };
    assert!(all(3) == all(3) && all(3) != all(4));
    let other = text_to_image(5, Split::Train, 3, 1, 3);
    assert_ne!(other.scene, all(3).1);
}

#[test]
fn prompts_describe_their_scenes() {
    for split in Split::ALL {
        for index in 0..200 {
            let sample = text_to_image(1, split, index, 1, 5);
            let parsed = parse(&sample.prompt).unwrap_or_else(|e| panic!("{}: {e}", sample.prompt));
            assert_eq!(parsed, sample.graph, "{}", sample.prompt);
            let judgement = sample.scene.view().judge(&sample.graph);
            assert!(judgement.perfect(), "{}: {judgement:?}", sample.prompt);
            let n = sample.scene.items.len();
            assert!(n >= split.objects().0 && n <= split.most());
            assert!(sample::valid(&sample.scene, &(0..n).collect::<Vec<_>>()));
        }
    }
}

#[test]
fn the_curriculum_bounds_the_number_of_objects() {
    let sizes = |min, max| (0..60).map(move |i| text_to_image(0, Split::Train, i, min, max).scene.items.len());
    assert!(sizes(1, 1).all(|n| n == 1));
    assert!(sizes(2, 2).all(|n| n == 2));
    assert_eq!(sizes(1, 3).collect::<HashSet<_>>().len(), 3);
    assert_eq!(sizes(2, 9).collect::<HashSet<_>>(), HashSet::from([2, 3, 4, 5]));
}

#[test]
fn the_curriculum_says_how_many_scenes_have_two_that_touch() {
    let touches = |scene: &Scene| {
        let items = &scene.items;
        (0..items.len()).any(|i| (0..i).any(|j| !sample::apart(&items[i], &items[j])))
    };
    let drawn = |touching| {
        let scenes = (0..40).map(|i| text_to_image_touching(0, Split::Train, i, 2, 3, touching).scene);
        scenes.filter(touches).count()
    };
    assert_eq!((drawn(0.0), drawn(1.0)), (0, 40));
    let brought_together = |touching| {
        let emphasis = Emphasis { touching, ..Default::default() };
        let edits = (0..200).map(|i| edit_with(0, Split::Train, i, 2, 3, emphasis).edit);
        edits.filter(|edit| matches!(edit, Edit::Move { places, .. } if !places[0].0.is_direction())).count()
    };
    assert!(brought_together(0.0) == 0 && brought_together(1.0) > 6, "{}", brought_together(1.0));
}

#[test]
fn the_curriculum_says_how_often_several_places_are_named() {
    let named = |several_places| {
        let emphasis = Emphasis { moves: 1.0, several_places, ..Default::default() };
        let samples = (0..100).map(|i| edit_with(3, Split::Train, i, 3, 5, emphasis));
        samples
            .map(|sample| match &sample.edit {
                Edit::Move { places, .. } => {
                    // They all hold afterwards, and the words say all of them.
                    assert!(sample.target.view().judge(&sample.after).perfect());
                    assert_eq!(Edit::parse(&sample.instruction).as_ref(), Ok(&sample.edit));
                    places.len()
                }
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>()
    };
    assert!(named(0.0).iter().all(|n| *n == 1));
    let several = named(1.0);
    let with = |n: usize| several.iter().filter(|named| **named == n).count();
    assert!(with(2) > 20 && with(3) > 5, "{several:?}");
    // What is added somewhere has several too, and what is added anywhere stays without.
    let emphasis = Emphasis { several_places: 1.0, ..Default::default() };
    let samples = (0..400).map(|i| edit_with(4, Split::Train, i, 3, 5, emphasis));
    let added: Vec<usize> =
        samples.filter_map(|s| if let Edit::Add { places, .. } = s.edit { Some(places.len()) } else { None }).collect();
    let with = |n: usize| added.iter().filter(|named| **named == n).count();
    assert!(with(0) > 2 && with(1) < with(2) + with(3), "{added:?}");
}

#[test]
fn the_curriculum_says_how_many_edits_move_something() {
    let moved = |moves| {
        let emphasis = Emphasis { moves, ..Default::default() };
        (0..200).filter(|i| edit_with(0, Split::Train, *i, 2, 3, emphasis).kind == Kind::Move).count()
    };
    assert_eq!(moved(1.0), 200);
    // A seventh of those that are drawn evenly move something, too.
    assert!((10..50).contains(&moved(0.0)) && (90..140).contains(&moved(0.5)), "{} {}", moved(0.0), moved(0.5));
}

/// The (shape, colour) sets of a split's scenes, of those with two or more objects.
fn sets(split: Split) -> HashSet<Vec<(Shape, Colour)>> {
    let set = |scene: &Scene| {
        let mut set: Vec<(Shape, Colour)> = scene.items.iter().map(|i| (i.shape, i.colour)).collect();
        set.sort();
        set
    };
    let texts = (0..1500).map(|i| text_to_image(i % 3, split, i, 2, 3).scene);
    let edits = (0..500).flat_map(|i| {
        let sample = edit(i % 3, split, i, 1, 3);
        [Some(sample.source), (split == Split::Train).then_some(sample.target)].into_iter().flatten()
    });
    let checks = (0..500).map(|i| check(i % 3, split, i, 1, 3).scene).filter(|_| split == Split::Train);
    texts.chain(edits).chain(checks).filter(|s| s.items.len() > 1).map(|s| set(&s)).collect()
}

#[test]
fn splits_share_no_set_of_objects() {
    let (train, val, test) = (sets(Split::Train), sets(Split::Val), sets(Split::Test));
    assert!(train.len() > 1000 && val.len() > 100 && test.len() > 100);
    assert!(train.is_disjoint(&val) && train.is_disjoint(&test) && val.is_disjoint(&test));
    for split in [Split::TestUnseen, Split::TestParaphrase] {
        assert!(train.is_disjoint(&sets(split)));
    }
}

#[test]
fn training_never_names_a_held_out_relation() {
    for i in 0..500 {
        let named = [
            text_to_image(2, Split::Train, i, 1, 3).graph,
            edit(2, Split::Train, i, 1, 3).after,
            check(2, Split::Train, i, 1, 3).graph,
            act(2, Split::Train, i, 1, 3).graph,
        ];
        assert!(named.iter().all(|g| split::held_out_relations(g) == 0));
        assert!(split::held_out_relations(&text_to_image(2, Split::TestUnseen, i, 1, 3).graph) > 0);
    }
}

fn objects_named(edit: &Edit) -> Vec<&Object> {
    match edit {
        Edit::Swap { first, second } => vec![first, second],
        Edit::Add { .. } => vec![],
        Edit::Move { what, .. }
        | Edit::Remove { what }
        | Edit::Recolour { what, .. }
        | Edit::Resize { what, .. }
        | Edit::Replace { what, .. } => vec![what],
    }
}

#[test]
fn edits_do_what_they_say_and_leave_the_rest_in_place() {
    let mut kinds: BTreeMap<Kind, usize> = BTreeMap::new();
    for index in 0..1200 {
        let split = if index % 4 == 0 { Split::TestMany } else { Split::Train };
        let sample = edit(9, split, index, 1, 5);
        *kinds.entry(sample.kind).or_default() += 1;
        assert_eq!(Edit::parse(&sample.instruction).as_ref(), Ok(&sample.edit), "{}", sample.instruction);
        assert_eq!(sample.source.background, sample.target.background);
        let touched: Vec<usize> = objects_named(&sample.edit)
            .into_iter()
            .map(|o| super::super::edit::find(&sample.source, o).unwrap())
            .collect();
        let rest = |items: &[Item]| -> Vec<Item> {
            items.iter().enumerate().filter(|(i, _)| !touched.contains(i)).map(|(_, x)| *x).collect()
        };
        let mut after = sample.target.items.clone();
        match sample.kind {
            Kind::Remove => after.insert(touched[0], sample.source.items[touched[0]]),
            Kind::Add => drop(after.pop()),
            _ => {}
        }
        assert_eq!(rest(&sample.source.items), rest(&after), "{}", sample.instruction);
        assert_ne!(sample.source, sample.target);
        let judgement = sample.target.view().judge(&sample.after);
        assert!(judgement.perfect(), "{}: {judgement:?} {:?}", sample.instruction, sample.after);
        if let Edit::Move { places, .. } = &sample.edit {
            assert!(sample.after.relations.iter().any(|r| r.predicate == places[0].0.name()));
        }
    }
    assert!(Kind::ALL.iter().all(|k| kinds.get(k).is_some_and(|n| *n > 80)), "{kinds:?}");
}

#[test]
fn a_recolouring_changes_no_pixel_outside_its_object() {
    let sample = (0..).map(|i| edit(1, Split::Train, i, 2, 3)).find(|s| s.kind == Kind::Recolour).unwrap();
    let what = objects_named(&sample.edit)[0];
    let item = sample.source.items[super::super::edit::find(&sample.source, what).unwrap()];
    let (before, after) = (render(&sample.source), render(&sample.target));
    let mut changed = 0;
    for (x, y, p) in before.enumerate_pixels() {
        if p != after.get_pixel(x, y) {
            changed += 1;
            assert!(item.distance(x as f32 + 0.5, y as f32 + 0.5) < 1.0);
        }
    }
    assert!(changed > 50);
}

#[test]
fn claims_are_balanced_and_true_to_the_scene() {
    let (mut objects, mut relations) = ([0usize; 2], [0usize; 2]);
    for index in 0..1500 {
        let sample = check(6, Split::Train, index, 1, 3);
        assert_eq!(sample.truth, sample.scene.view().judge(&sample.graph));
        for (claim, truth) in sample.claims() {
            match claim {
                Claim::Object(_) => objects[usize::from(truth)] += 1,
                Claim::Relation { .. } => relations[usize::from(truth)] += 1,
            }
        }
    }
    let share = |[no, yes]: [usize; 2]| yes as f64 / (no + yes) as f64;
    assert!((0.4..0.7).contains(&share(objects)), "{objects:?}");
    assert!((0.4..0.6).contains(&share(relations)), "{relations:?}");
}

#[test]
fn an_actors_edit_mends_something() {
    let mut kinds: BTreeMap<Kind, usize> = BTreeMap::new();
    for index in 0..600 {
        let sample = act(6, Split::Train, index, 1, 3);
        *kinds.entry(sample.edit.kind()).or_default() += 1;
        assert!(!sample.truth.perfect());
        assert_eq!(parse(&sample.prompt).unwrap(), sample.graph);
        assert_eq!(Edit::parse(&sample.instruction).unwrap(), sample.edit);
        let after = sample.target.view().judge(&sample.graph);
        assert!(after.satisfied() > sample.truth.satisfied() || after.extra < sample.truth.extra);
    }
    assert_eq!(kinds.len(), 7, "{kinds:?}");
}

#[test]
fn edits_of_a_scene_at_hand_often_help_and_change_it() {
    let (mut found, mut helped) = (0, 0);
    for index in 0..100 {
        let sample = act(3, Split::Train, index, 1, 3);
        let Some((instruction, target)) = edit_of(3, index, &sample.scene, &sample.graph, 0.0) else { continue };
        found += 1;
        assert!(!instruction.is_empty() && target != sample.scene && sample::trainable(&target));
        helped += usize::from(target.view().judge(&sample.graph).better_than(&sample.truth));
    }
    assert!(found >= 95 && (50..95).contains(&helped), "{helped} of {found} helped");
    // In several places, which hold.
    let several = (0..300).filter_map(|index| {
        let sample = act(3, Split::Train, index, 3, 5);
        let (instruction, target) = edit_of(3, index, &sample.scene, &sample.graph, 1.0)?;
        let find = |reference: &Object| super::super::edit::find(&sample.scene, reference).unwrap();
        let (i, places) = match Edit::parse(&instruction).unwrap() {
            Edit::Move { what, places } => (find(&what), places),
            Edit::Add { places, .. } => (sample.scene.items.len(), places),
            _ => return None,
        };
        assert!(places.iter().all(|(r, anchor)| target.view().holds(i, *r, find(anchor))), "{instruction}");
        (places.len() > 1).then_some(())
    });
    let several = several.count();
    assert!(several > 20, "{several}");
}

#[test]
fn what_an_instruction_asks_of_a_scene_holds_after_it() {
    let (mut asked, mut idle) = (0, 0);
    for index in 0..100 {
        let EditSample { source, target, edit, instruction, .. } = edit(4, Split::Train, index, 2, 3);
        let Some(after) = after(4, index, &source, &instruction) else { continue };
        idle += usize::from(source.view().judge(&after).perfect());
        // A place may be another one that is as good, and a size that is not said too.
        let mut counts = [&source, &target].map(|scene| scene.items.len());
        counts.sort_unstable();
        assert!((counts[0]..=counts[1]).contains(&after.objects.len()));
        let judged = target.view().judge(&after);
        asked += usize::from(judged.perfect());
        assert!(judged.perfect() || edit.kind() == Kind::Add, "{instruction}: {after:?}");
    }
    assert!(asked > 70, "{asked}");
    assert!(idle < 5, "{idle} are met by leaving the picture as it is");
    let scene = edit(4, Split::Train, 0, 2, 3).source;
    assert!(after(4, 0, &scene, "make it better").is_none());
}

#[test]
fn what_an_edit_does_not_touch_is_asked_to_stay() {
    let (mut asked, mut missed) = (0, 0);
    for index in 0..300 {
        let EditSample { source, target, edit, instruction, .. } = edit(4, Split::Train, index, 3, 3);
        // It asks for no relation itself.
        if edit.kind() != Kind::Recolour {
            continue;
        }
        let graph = after(4, index, &source, &instruction).unwrap();
        let what = super::super::edit::find(&source, objects_named(&edit)[0]).unwrap();
        let rest: Vec<usize> = (0..3).filter(|i| *i != what).collect();
        assert!(graph.relations.len() <= 1 && target.view().judge(&graph).perfect(), "{instruction}: {graph:?}");
        assert!(graph.relations.iter().all(|r| rest.contains(&r.subject) && rest.contains(&r.object)));
        assert_eq!(split::held_out_relations(&graph), 0);
        asked += graph.relations.len();
        let mut swapped = target.clone();
        for (i, j) in [(rest[0], rest[1]), (rest[1], rest[0])] {
            (swapped.items[i].x, swapped.items[i].y) = (target.items[j].x, target.items[j].y);
        }
        missed += swapped.view().judge(&graph).relations.iter().filter(|held| !**held).count();
    }
    // What lies in front of the other or inside it still does.
    assert!(asked > 20 && 2 * missed > asked, "{missed} of {asked} are missed");
}

#[test]
fn a_wish_is_a_prompt_for_training_that_the_scene_misses() {
    let mut found = 0;
    for index in 0..200 {
        let scene = check(2, Split::Train, index, 1, 3).scene;
        let Some((prompt, graph)) = wish(&mut Stream::new(2, "wish", index), &scene) else { continue };
        assert_eq!(parse(&prompt).unwrap().canonical(), graph.canonical(), "{prompt}");
        assert!(sample::admissible(Split::Train, &graph) && (1..=MOST).contains(&graph.objects.len()), "{prompt}");
        assert!(!scene.view().judge(&graph).perfect(), "{prompt}");
        found += 1;
    }
    assert!(found > 180, "{found}");
    let empty = Scene { items: Vec::new(), ..check(2, Split::Train, 0, 1, 3).scene };
    assert!(wish(&mut Stream::new(2, "wish", 0), &empty).is_none());
}
