//! `deltabox tree`.

use std::collections::{BTreeMap, BTreeSet};

use crate::deltacr::moment::Outlook;
use crate::engine::{TreeNode, TreeReport};
use crate::sandbox::SandboxId;

use super::{Context, Outcome, print};

/// Shows the checkpoints of a sandbox: who comes from whom, and what each takes.
#[derive(Debug, clap::Args)]
#[command(after_help = "`*` marks the checkpoint that the sandbox's state comes from. OWN is what the checkpoint's \
                        removal would free, SHARED what others need too. MEMORY is what its \
                        processes had of their own; TEMPLATES counts those that only it has + those that \
                        other checkpoints have too, HELD what they take of memory. BACK is how a \
                        rollback would bring its processes back now.")]
pub(super) struct Args {
    /// The sandbox.
    sandbox: SandboxId,
}

pub(super) fn run(args: Args, context: &Context) -> Outcome {
    let tree: TreeReport = context.client()?.get(&format!("/v1/sandboxes/{}/checkpoints", args.sandbox))?;
    if context.json {
        print::json(&tree)?;
        return Ok(0);
    }
    let rows: Vec<_> = drawn(&tree).into_iter().map(|(drawing, node)| cells(drawing, node, &tree)).collect();
    print::table(
        &[
            "CHECKPOINT",
            "NAME",
            ">AGE",
            ">LAYERS",
            ">OWN",
            ">SHARED",
            ">PROCESSES",
            ">MEMORY",
            ">TEMPLATES",
            ">HELD",
            "BACK",
            ">STOPPED us",
        ],
        &rows,
    )?;
    for node in &tree.checkpoints {
        if let Some(damage) = &node.damage {
            print::line(&format!("{} is damaged: {}", node.checkpoint.id, print::printable(damage)))?;
        }
    }
    Ok(0)
}

fn cells(drawing: String, node: &TreeNode, tree: &TreeReport) -> Vec<String> {
    let one = &node.checkpoint;
    let mark = if tree.head.as_ref() == Some(&one.id) { " *" } else { "" };
    vec![
        format!("{drawing}{}{mark}", one.id),
        one.name.clone().unwrap_or_default(),
        print::age(one.created_unix_ms),
        node.n_layers.to_string(),
        print::size(node.own_bytes),
        print::size(node.shared_bytes),
        if one.fs_only { "-".to_owned() } else { one.n_processes.to_string() },
        if one.fs_only { "-".to_owned() } else { print::size(one.memory_bytes) },
        if node.in_memory { templates(node) } else { "-".to_owned() },
        if node.in_memory { print::size(held_bytes(node)) } else { "-".to_owned() },
        back(node),
        one.stopped_us.to_string(),
    ]
}

/// How many are its own, and how many others have too.
pub(super) fn templates(node: &TreeNode) -> String {
    format!("{} + {}", node.own_templates.n_templates, node.shared_templates.n_templates)
}

/// What they take of memory.
pub(super) fn held_bytes(node: &TreeNode) -> u64 {
    node.own_templates.bytes + node.shared_templates.bytes
}

/// How a rollback would go.
pub(super) fn back(node: &TreeNode) -> String {
    match &node.outlook {
        None if node.checkpoint.fs_only => "files only".to_owned(),
        None => "files; processes lost".to_owned(),
        Some(outlook) if outlook.refused.is_some() => "refused".to_owned(),
        Some(Outlook { n_in_place, n_forked, n_rebuilt, .. }) => {
            let ways = [(n_in_place, "in place"), (n_forked, "fork"), (n_rebuilt, "rebuild")];
            let some: Vec<_> = ways.iter().filter(|(n, _)| **n > 0).map(|(n, way)| format!("{n} {way}")).collect();
            if some.is_empty() { "no processes".to_owned() } else { some.join(", ") }
        }
    }
}

/// Every node with the lines that lead to it, children below their parent. A chain of any length takes one column:
/// only where it branches there are lines.
fn drawn(tree: &TreeReport) -> Vec<(String, &TreeNode)> {
    let known: BTreeSet<&str> = tree.checkpoints.iter().map(|node| node.checkpoint.id.as_str()).collect();
    let mut children: BTreeMap<Option<&str>, Vec<&TreeNode>> = BTreeMap::new();
    for node in &tree.checkpoints {
        // One whose parent cannot be read is shown all the same.
        let parent = node.checkpoint.parent.as_deref().filter(|parent| known.contains(parent));
        children.entry(parent).or_default().push(node);
    }
    let mut rows = Vec::new();
    // What is still to be drawn, the next one last: a node, the lines above it, and its own branch.
    let mut left: Vec<(&TreeNode, String, &str)> =
        children.remove(&None).unwrap_or_default().into_iter().rev().map(|node| (node, String::new(), "")).collect();
    while let Some((node, lines, branch)) = left.pop() {
        rows.push((format!("{lines}{branch}"), node));
        let below = match branch {
            "├─ " => format!("{lines}│  "),
            "└─ " => format!("{lines}   "),
            _ => lines,
        };
        let below_it = children.remove(&Some(node.checkpoint.id.as_str())).unwrap_or_default();
        let n = below_it.len();
        for (i, child) in below_it.into_iter().enumerate().rev() {
            let branch = match (n, i + 1 == n) {
                (1, _) => "",
                (_, true) => "└─ ",
                (_, false) => "├─ ",
            };
            left.push((child, below.clone(), branch));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{CheckpointReport, PoolReport};
    use crate::pool::Weight;

    fn node(id: &str, parent: Option<&str>) -> TreeNode {
        let checkpoint = CheckpointReport {
            sandbox: "a".parse().unwrap(),
            id: id.to_owned(),
            name: None,
            parent: parent.map(str::to_owned),
            epoch: 0,
            created_unix_ms: 0,
            fs_only: true,
            fs_frozen: true,
            durable: false,
            stopped_us: 0,
            total_us: 0,
            phases_us: Vec::new(),
            n_processes: 0,
            n_threads: 0,
            n_descriptions: 0,
            memory_bytes: 0,
        };
        TreeNode {
            checkpoint,
            n_layers: 0,
            own_bytes: 0,
            shared_bytes: 0,
            in_memory: false,
            own_templates: Weight::default(),
            shared_templates: Weight::default(),
            outlook: None,
            damage: None,
        }
    }

    #[test]
    fn chains_take_one_column_and_branches_have_lines() {
        let edges = [("c1", None), ("c2", Some("c1")), ("c3", Some("c2")), ("c4", Some("c2")), ("c5", Some("c3"))];
        let checkpoints = edges.iter().map(|(id, parent)| node(id, *parent)).collect();
        let tree = TreeReport { sandbox: "a".parse().unwrap(), head: None, checkpoints, pool: PoolReport::default() };
        let rows: Vec<_> = drawn(&tree).iter().map(|(line, node)| format!("{line}{}", node.checkpoint.id)).collect();
        assert_eq!(rows, ["c1", "c2", "├─ c3", "│  c5", "└─ c4"]);
    }

    #[test]
    fn a_checkpoint_whose_parent_is_not_known_is_drawn() {
        let checkpoints = vec![node("c2", Some("c1")), node("c3", Some("c2"))];
        let tree = TreeReport { sandbox: "a".parse().unwrap(), head: None, checkpoints, pool: PoolReport::default() };
        assert_eq!(drawn(&tree).len(), 2);
    }
}
