# Two programs at a time; the status of the first is its own.
/usr/bin/python3 -c "$PROGRAM" "$1" & first=$!
while :; do sleep 0.05; done & second=$!
wait $first; status=$?
kill $second
wait $second 2> /dev/null
[ $? = 143 ] || { echo "the second ended by itself"; exit 99; }
exit $status
