//! The command line is a contract: each line of it parses, and nothing else does.

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_parser_is_sound() {
    <Cli as clap::CommandFactory>::command().debug_assert();
}

#[test]
fn every_line_of_the_contract_parses() {
    let lines = [
        "deltabox doctor",
        "deltabox create",
        "deltabox create dev --base host --with /opt/a --with ./b --net none --memory 512M --pids 100 --env A=1 --env B=",
        "deltabox create --base ./rootfs --net host",
        "deltabox create --base debian-12",
        "deltabox run -- true",
        "deltabox run --base host --memory 1G --keep -w /src -u 1000:1000 -- sh -c true",
        "deltabox exec dev -- make -j4",
        "deltabox exec -t -i -w /src -u 1000 --env A=1 --on-disconnect leave dev -- bash -l",
        "deltabox exec -ti dev -- bash",
        "deltabox exec -d dev -- sleep 100",
        "deltabox exec dev -- prog --json -- --help",
        "deltabox attach dev 12",
        "deltabox ls",
        "deltabox ls --json",
        "deltabox --json ls",
        "deltabox ps dev",
        "deltabox inspect dev",
        "deltabox stats",
        "deltabox stats dev --format json",
        "deltabox logs dev",
        "deltabox logs dev 12 -f",
        "deltabox checkpoint dev",
        "deltabox checkpoint dev --name built --fs-only --durable",
        "deltabox rollback dev c1",
        "deltabox rollback dev built --fs-only --json",
        "deltabox tree dev",
        "deltabox diff dev",
        "deltabox diff dev c1 -p",
        "deltabox diff dev built c4 --patch --contents --json",
        "deltabox gc",
        "deltabox inspect dev@c1",
        "deltabox rm dev@c1 dev",
        "deltabox kill dev",
        "deltabox rm a b c",
        "deltabox image import debian ./rootfs.tar",
        "deltabox image ls",
        "deltabox image rm debian",
        "deltabox serve --socket /tmp/s --store /tmp/d --ready-fd 3",
        "deltabox --socket /tmp/s --store /tmp/d ls",
    ];
    for line in lines {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn what_is_not_in_the_contract_is_a_usage_error() {
    let lines = [
        "deltabox",
        "deltabox nonsense",
        "deltabox create Bad_Name",
        "deltabox create --memory lots",
        "deltabox create --net bridge",
        "deltabox create --env NOVALUE",
        "deltabox create --pids 0",
        "deltabox exec dev",
        "deltabox exec dev make",
        "deltabox exec -d -t dev -- sh",
        "deltabox exec -u root dev -- sh",
        "deltabox exec --on-disconnect maybe dev -- sh",
        "deltabox run",
        "deltabox attach dev",
        "deltabox attach dev x",
        "deltabox rm",
        "deltabox logs dev -f --json",
        "deltabox image import debian",
        "deltabox diff",
        "deltabox diff dev c1 c2 c3",
        "deltabox diff dev a&b",
        // Not built yet: they must not look as if they were.
        "deltabox fork dev",
        "deltabox export dev@c1 d",
        "deltabox import d",
        "deltabox stats --format hgrm",
        "deltabox trace dev",
    ];
    for line in lines {
        match parse(line) {
            Ok(_) => panic!("{line} was taken"),
            Err(error) => assert_eq!(error.exit_code(), 2, "{line}"),
        }
    }
}

#[test]
fn help_and_version_are_not_errors() {
    for line in ["deltabox --help", "deltabox help exec", "deltabox image --help", "deltabox --version"] {
        assert_eq!(parse(line).unwrap_err().exit_code(), 0, "{line}");
    }
}

#[test]
fn options_of_the_command_inside_are_not_ours() {
    let Command::Exec(args) = parse("deltabox exec dev -- prog --json -t").unwrap().command else { panic!("no exec") };
    assert!(!parse("deltabox exec dev -- prog --json").unwrap().json);
    assert!(format!("{args:?}").contains(r#"["prog", "--json", "-t"]"#), "{args:?}");
    let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    assert!(wants_json(&words("deltabox exec --json x")));
    assert!(!wants_json(&words("deltabox exec x -- prog --json")));
}

#[test]
fn with_needs_the_host_as_base() {
    let Command::Create(args) = parse("deltabox create --base ./x --with /opt").unwrap().command else { panic!() };
    let context = Context { place: Place::find(Some("/nowhere/sock".into()), None), json: false };
    assert_eq!(create::run(args, &context).unwrap_err().exit_code, 2);
}
