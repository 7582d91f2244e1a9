pub(crate) fn run(_: &crate::Workspace) -> anyhow::Result<()> {
    Ok(())
}
#[derive(clap::Args)]
pub(crate) struct KeeperArgs {}
pub(crate) fn keep(_: &KeeperArgs) -> anyhow::Result<()> {
    Ok(())
}
