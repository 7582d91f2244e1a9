import xml.etree.ElementTree

# A graph library whose wheel brings its own tests.
PIP = ['/usr/bin/python3', '-m', 'pip', '--disable-pip-version-check', '--no-cache-dir', '-q']
run(*PIP, 'install', '--target', '/srv/site', 'pytest==8.3.4', 'networkx==3.4.2')
env = {**os.environ, 'PYTHONPATH': '/srv/site'}

def one(n):
    run('/usr/bin/python3', '-m', 'pytest', '-q', '--junit-xml=report.xml', '--basetemp=/srv/work/temp', '--pyargs',
        'networkx.classes', 'networkx.readwrite', env=env)
    cases = xml.etree.ElementTree.parse('report.xml').getroot().iter('testcase')
    told = sorted((case.get('classname'), case.get('name'), [child.tag for child in case]) for case in cases)
    assert len(told) > 500, len(told)
    print(len(told), hashlib.sha256(repr(told).encode()).hexdigest())
    shutil.rmtree('/srv/work/.pytest_cache', ignore_errors=True)

rounds(one)
