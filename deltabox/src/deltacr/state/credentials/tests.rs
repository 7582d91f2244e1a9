use super::*;

const ALL: u64 = 0x1ff_ffff_ffff;
const JUDGE: Judge = Judge { pid: 7 };

fn root() -> Credentials {
    let sets = Sets { permitted: ALL, effective: ALL, bounding: ALL, ..Sets::default() };
    Credentials { supplementary: vec![4, 5], sets, seccomp_mode: 2, n_filters: 1, ..Credentials::default() }
}

fn user() -> Credentials {
    let ids = Ids { real: 1000, effective: 1000, saved: 1000, fs: 1000 };
    let sets = Sets { bounding: ALL, ..Sets::default() };
    Credentials { users: ids, groups: ids, sets, ..root() }
}

fn with(mut one: Credentials, change: impl FnOnce(&mut Credentials)) -> Credentials {
    change(&mut one);
    one
}

#[test]
fn what_was_given_up_for_good_is_named() {
    let cases: [(Credentials, Credentials, &str); 14] = [
        (root(), user(), "permitted capabilities"),
        (root(), with(root(), |c| c.sets.permitted = 1), "permitted capabilities"),
        (root(), with(root(), |c| c.sets.bounding = 1), "the bound of capabilities"),
        (root(), with(root(), |c| c.no_new_privs = true), "no_new_privs"),
        (root(), with(root(), |c| c.n_filters = 2), "seccomp"),
        (with(root(), |c| c.n_filters = 2), root(), "seccomp"),
        (user(), with(user(), |c| c.seccomp_mode = 1), "seccomp"),
        (user(), with(user(), |c| c.supplementary.clear()), "supplementary groups"),
        (user(), with(user(), |c| c.users.saved = 1001), ""),
        (with(user(), |c| c.users.real = 1), user(), "users"),
        (with(user(), |c| c.groups.fs = 1), user(), "groups"),
        (user(), with(root(), |c| c.securebits = 0x3), "securebits"),
        (with(user(), |c| c.sets.inheritable = 1), user(), "inheritable capabilities"),
        (with(user(), |c| c.securebits = 1), user(), "securebits"),
    ];
    for (was, is, what) in cases {
        let judged = was.judge(&is, &JUDGE);
        assert_eq!(judged.as_ref().map_or_else(|impossible| impossible.what, |()| ""), what, "{was:?} from {is:?}");
    }
}

#[test]
fn what_privileges_reach_is_possible() {
    let cases = [
        (root(), root()),
        (user(), user()),
        // From more to less, as from another parent.
        (user(), root()),
        (with(user(), |c| c.no_new_privs = true), root()),
        (with(user(), |c| c.sets.bounding = 0), root()),
        // Each of a user's ids is one of those that it has.
        (with(user(), |c| c.users.saved = 5), with(user(), |c| c.users.real = 5)),
        (with(user(), |c| c.securebits = KEEP_CAPS), user()),
        (with(root(), |c| c.securebits = 0xef), root()),
    ];
    for (was, is) in cases {
        assert_eq!(was.judge(&is, &JUDGE), Ok(()), "{was:?} from {is:?}");
    }
}

#[test]
fn ambient_capabilities_rise_unless_that_is_forbidden_for_good() {
    let was = with(root(), |c| (c.sets.inheritable, c.sets.ambient) = (1, 1));
    let is = |bits| with(root(), |c| (c.sets.inheritable, c.securebits) = (1, bits));
    assert_eq!(was.judge(&is(NO_CAP_AMBIENT_RAISE), &JUDGE), Ok(()));
    let locked = NO_CAP_AMBIENT_RAISE | NO_CAP_AMBIENT_RAISE << 1;
    let was_too = with(was.clone(), |c| c.securebits = locked);
    assert_eq!(was_too.judge(&is(locked), &JUDGE).expect_err("locked").what, "ambient capabilities");
    // It is still there, unless ids change.
    let still = with(is(locked), |c| c.sets.ambient = 1);
    assert_eq!(was_too.judge(&still, &JUDGE), Ok(()));
    let other_id = with(still, |c| c.users.saved = 9);
    assert_eq!(was_too.judge(&other_id, &JUDGE).expect_err("locked").what, "ambient capabilities");
}

#[test]
fn a_refusal_says_what_was_and_what_is() {
    let refused = with(user(), |c| c.users.real = 1).judge(&user(), &JUDGE).expect_err("no capability");
    let text = "process 7 (inside) cannot be what it was: users was 1 1000 1000 1000, is 1000 1000 1000 1000";
    assert_eq!(refused.to_string(), text);
}

#[test]
fn only_more_than_no_new_privs_makes_the_kernel_forget() {
    assert!(!with(root(), |c| c.no_new_privs = true).is_other(&root()));
    assert!(with(root(), |c| c.users.fs = 3).is_other(&root()));
}
