for k in range(5000):
    at = f'tree/{k % 10}/{k % 70}'
    os.makedirs(at, exist_ok=True)
    write(f'{at}/{k}', bytes_of(k % 3000, k))
    os.chmod(f'{at}/{k}', [0o644, 0o755, 0o600, 0o4711][k % 4])
    if k % 100 == 0:
        os.symlink(f'{k}', f'{at}/{k}.link')
expected = digest('tree')
print(expected)

def one(n):
    assert run('tar', '-cf', 'all.tar', 'tree') == '', 'tar saw a file change'
    os.mkdir('copy')
    assert run('tar', '-xpf', 'all.tar', '-C', 'copy') == ''
    assert run('tar', '-df', 'all.tar', '-C', 'copy') == '', 'tar sees a difference'
    assert run('tar', '-df', 'all.tar') == '', 'tar sees a difference to what it packed'
    os.chdir('copy')
    assert digest('tree') == expected, 'content'
    os.chdir('..')
    assert len(run('tar', '-tf', 'all.tar').split('\n')) == 5000 + 50 + 1 + 10 + 70, 'names'
    shutil.rmtree('copy')
    os.unlink('all.tar')

rounds(one)
print(digest('tree'))
