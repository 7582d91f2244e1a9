os.environ.update(GIT_CONFIG_GLOBAL='/srv/gitconfig', GIT_AUTHOR_NAME='a', GIT_AUTHOR_EMAIL='a@b', GIT_COMMITTER_NAME='a',
                  GIT_COMMITTER_EMAIL='a@b')
# checkStat: `git stash create`, which merge calls, fails if a file's inode changes while it runs, and it changes at the
# checkpoint that freezes the file. docs/checkpoints.md says so.
write('/srv/gitconfig', b'[core]\ncheckStat = minimal\n[gc]\nauto = 0\n[init]\ndefaultBranch = main\n[pack]\nthreads = 2\n')
run('git', 'init', '-q', 'repo')
os.chdir('repo')

def one(n):
    os.environ.update(GIT_AUTHOR_DATE=f'{1700000000 + n} +0000', GIT_COMMITTER_DATE=f'{1700000000 + n} +0000')
    for k in range(30):
        os.makedirs(f'd{k % 5}', exist_ok=True)
        write(f'd{k % 5}/f{k}', bytes_of(1000 + 100 * k, n, k))
    assert n == 0 or len(run('git', 'status', '--porcelain').split('\n')) == 30, 'status sees each change'
    run('git', 'add', '-A')
    run('git', 'commit', '-q', '-m', f'{n}')
    run('git', 'checkout', '-q', '-b', f'side{n}')
    write('side', b'%d\n' % n)
    run('git', 'add', 'side')
    run('git', 'commit', '-q', '-m', f'side {n}')
    run('git', 'checkout', '-q', 'main')
    write('d0/f0', b'%d\n' % n)
    run('git', 'stash', '-q')
    run('git', 'merge', '-q', '--no-ff', '-m', f'merge {n}', f'side{n}')
    run('git', 'stash', 'pop', '-q')
    run('git', 'commit', '-q', '-a', '-m', f'popped {n}')
    assert run('git', 'status', '--porcelain') == '', 'nothing left to commit'
    if n % 2:
        run('git', 'gc', '-q', '--prune=now')
    # Without: git takes a linked file for another one when its inode number changes (docs/checkpoints.md).
    run('git', 'clone', '-q', '--no-hardlinks', '.', '/srv/work/clone')
    assert run('git', '-C', '/srv/work/clone', 'rev-parse', 'HEAD') == run('git', 'rev-parse', 'HEAD')
    shutil.rmtree('/srv/work/clone')

rounds(one)
print(run('git', 'fsck', '--full', '--strict', '--no-dangling'))
print(run('git', 'log', '--all', '--format=%H %s'))
print(hashlib.sha256(run('git', 'rev-list', '--all', '--objects').encode()).hexdigest(), digest('.', ['.git']))
run('git', 'gc', '-q', '--aggressive', '--prune=now')
print(run('git', 'count-objects', '-v').split('\n')[:3])
print(run('git', 'fsck', '--full', '--strict'))
