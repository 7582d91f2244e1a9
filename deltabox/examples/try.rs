use deltabox::engine::*;
use std::sync::mpsc::channel;
use std::io::Read;
use std::os::fd::AsFd;
fn main() {
    let t0 = std::time::Instant::now();
    let engine = Engine::open(&Config { store: std::env::args().nth(1).unwrap().into() }).unwrap();
    println!("open {:?}", t0.elapsed());
    for i in 0..3 {
    let (tx, rx) = channel();
    let t0 = std::time::Instant::now();
    engine.create(CreateRequest { name: Some(format!("a{i}").parse().unwrap()), ..Default::default() }, Box::new(move |r| tx.send(r).unwrap()));
    let r = rx.recv().unwrap();
    println!("create {:?} {:?}", t0.elapsed(), r);
    }
    let id: deltabox::sandbox::SandboxId = "a0".parse().unwrap();
    for cmd in std::env::args().skip(2) {
    let (tx, rx) = channel(); let (tx2, rx2) = channel();
    let t0 = std::time::Instant::now();
    engine.exec(&id, ExecRequest { argv: vec!["sh".into(), "-c".into(), cmd], env: vec![], cwd: None, uid: 0, gid: None, stdio: Stdio::Pipes { stdin: false }, on_disconnect: OnDisconnect::End }, Box::new(move |e| tx2.send(e).unwrap()), Box::new(move |r| tx.send(r).unwrap()));
    match rx.recv().unwrap() { Err(e) => println!("{e}"), Ok(mut a) => {
        println!("started {:?}", t0.elapsed());
        let e = rx2.recv().unwrap();
        println!("{e:?} {:?}", t0.elapsed());
        if let Streams::Pipes { stdout, stderr, .. } = &mut a.streams { for fd in [stdout, stderr] {
            let mut f = std::fs::File::from(fd.as_fd().try_clone_to_owned().unwrap()); let mut b = vec![0; 65536];
            while let Ok(n @ 1..) = f.read(&mut b) { print!("{}", String::from_utf8_lossy(&b[..n])); } } }
    } } }
    for p in engine.processes(&id).unwrap() { println!("{p:?}"); }
    println!("{}", std::process::Command::new("sh").arg("-c").arg(format!("grep -E 'Rss|Pss|Private' /proc/{}/smaps_rollup; cat /proc/{}/status | grep -E 'Vm|Rss'", engine.inspect(&id).unwrap().init_pid.unwrap(), engine.inspect(&id).unwrap().init_pid.unwrap())).output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap());
    for i in 0..3 {
    let (tx, rx) = channel();
    let t0 = std::time::Instant::now();
    engine.remove(&format!("a{i}").parse().unwrap(), Box::new(move |r| tx.send(r).unwrap()));
    println!("rm {:?} {:?}", rx.recv().unwrap(), t0.elapsed());
    }
}
