# Pipelines, jobs and their statuses, a job that lives on and answers, and a trap.
set -o pipefail
said=/srv/said.0 lap=0 value=1 line= n_trapped=0
fail() { echo "at lap $lap: $*"; exit 3; }
coproc echoes { n=0; while read -r word; do n=$((n + 1)); echo "$n $word"; done; }
trap 'n_trapped=$((n_trapped + 1))' USR1
while :; do
    [ "$lap" = 0 ] || [ "$(tail -n 1 "$said")" = "$line" ] || fail "is '$line', its file $(tail -n 1 "$said")"
    value=$((value * 48271 % 2147483647))
    sum=$(seq 1 $((value % 50 + 20)) | sed 's/$/0/' | awk '{ n += $1 } END { print n }') || fail "pipeline: $?"
    n=$((value % 50 + 20))
    [ "$sum" = $((n * (n + 1) / 2 * 10)) ] || fail "sum of $n is '$sum'"
    (exit $((value % 7))) & a=$!
    seq 40 | sort -rn > "/srv/sorted$((lap % 3))" & b=$!
    { read -r _ || :; exit $((value % 5)); } < <(echo one) & c=$!
    wait $a; sa=$?; wait $c; sc=$?; wait $b; sb=$?
    [ "$sa $sb $sc" = "$((value % 7)) 0 $((value % 5))" ] || fail "statuses $sa $sb $sc of $value"
    [ "$(head -n 1 "/srv/sorted$((lap % 3))")" = 40 ] || fail "sorted: $(cat "/srv/sorted$((lap % 3))")"
    echo "$value" >&"${echoes[1]}"
    read -r echoed <&"${echoes[0]}"
    lap=$((lap + 1))
    [ "$echoed" = "$lap $value" ] || fail "told $lap $value, heard '$echoed'"
    kill -USR1 $$
    [ "$n_trapped" = "$lap" ] || fail "trapped $n_trapped"
    [ "$(jobs -p)" = "$echoes_PID" ] || fail "jobs: $(jobs -l)"
    line="$lap $(( ${EPOCHREALTIME/.} / 1000 )) $value $sum $sa$sb$sc $echoed"
    [ $((lap % 1000)) != 0 ] || mv "$said" "$said.old"
    echo "$line" >> "$said"
done
