"""Scripts of sh that start, watch and end a job on a host without a scheduler.

Each host has a folder of the user, in the folder of temporary files, with a folder for each job that was started there,
and the file `held`: the job to which the host is given, the host that runs its script, and when the host is free at the
latest. Each script is preceded by assignments of its variables and by `COMMON`, which lets one script run at a time.
"""

from __future__ import annotations

__all__ = ["CANCEL", "CLAIM", "COMMON", "EXISTS", "FREE", "PROBE", "REACH", "START", "STATUS"]

COMMON = r"""
umask 077
root=${TMPDIR:-/tmp}/rhapsody-hosts-$(id -u)
mkdir -p "$root" || exit 3
[ -O "$root" ] && [ ! -h "$root" ] || { echo "$root belongs to somebody else" >&2; exit 3; }
exec 9>"$root/lock" && flock -w 10 9 || { echo "$root/lock could not be locked" >&2; exit 3; }
now=$(date +%s)
j= f= e=0
[ ! -f "$root/held" ] || read -r j f e <"$root/held"
e=${e:-0}
started() { awk '{print $22}' "/proc/$1/stat" 2>/dev/null; }
is_alive() { # PID START BOOT
  [ -n "$1" ] && [ "$(started "$1")" = "$2" ] && [ "$(cat /proc/sys/kernel/random/boot_id)" = "$3" ]
}
"""

PROBE = r"""
echo "host $(uname -n) $(nproc) $(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
[ "$e" -le "$now" ] || echo "held $j $f $e"
"""
"""Prints what the host has, and who holds the host."""

CLAIM = r"""
[ "$e" -le "$now" ] || [ "$j" = "$job" ] || exit 4
echo "$job $first $((now + seconds + 120))" >"$root/held.part" && mv "$root/held.part" "$root/held" || exit 3
"""
"""Gives the host to `job`; ends with exit code 4 where another job has the host."""

FREE = r"""
[ "$j" != "$job" ] || rm -f "$root/held"
"""

START = r"""
find "$root" -mindepth 2 -maxdepth 2 -name exit -mtime +0 | while read -r old; do rm -rf "${old%/exit}"; done
folder=$root/$job
[ ! -f "$folder/pids" ] || exit 0
rm -rf "$folder"
mkdir "$folder" && printf %s "$script" >"$folder/script" || { rm -rf "$folder"; exit 3; }
export root folder job seconds interpreter
export RHAPSODY_HOSTS="$hosts" RHAPSODY_HOSTS_END="$((now + seconds))" RHAPSODY_HOSTS_JOB="$id"
echo "$now $((now + seconds)) $hosts" >"$folder/times" || { rm -rf "$folder"; exit 3; }
log=$folder/log
if [ -f "$probe" ]; then log=$shared_log; cd "${shared_log%/*}"; else cd /; fi
setsid sh -c '
  timeout -k 30 "$seconds" $interpreter "$folder/script" & t=$!
  for p in $$ $t; do
    echo "$p $(cut -d" " -f22 /proc/$p/stat 2>/dev/null) $(cat /proc/sys/kernel/random/boot_id)"
  done >"$folder/pids.part"
  mv "$folder/pids.part" "$folder/pids"
  wait $t; code=$?
  kill -9 -$t 2>/dev/null
  rm -f "$folder/script"
  read -r holder _ <"$root/held"; [ "$holder" != "$job" ] || rm -f "$root/held"
  echo "$code $(date +%s)" >"$folder/exit.part"; mv "$folder/exit.part" "$folder/exit"
' </dev/null >>"$log" 2>&1 9>&- &
session=$!
for i in 1 2 3 4 5 6 7 8 9 10; do [ ! -f "$folder/pids" ] || exit 0; sleep 0.5; done
echo "the job did not start: $(tail -n 1 "$log")" >&2
pkill -KILL -s "$session"
rm -rf "$folder"
exit 5
"""
"""Starts `script` with `interpreter` for `seconds`, detached. The job writes to `shared_log` where this host sees the
file `probe`, else to a file of its own."""

STATUS = r"""
if ! cd "$root/$job" 2>/dev/null; then
  if [ "$j" = "$job" ] && [ -n "$(find "$root/held" -mmin -2)" ]; then echo starting; else echo unknown; fi
  exit 0
fi
alive=
[ ! -f pids ] || while read -r pid start boot; do ! is_alive "$pid" "$start" "$boot" || alive=1; done <pids
echo "times $(cat times)"
if [ -f exit ]; then echo "exit $(cat exit)"; elif [ -n "$alive" ]; then echo running; else echo lost; fi
[ ! -f canceled ] || echo canceled
[ ! -f log ] || { echo log; tail -c 1000 log; }
"""

CANCEL = r"""
cd "$root/$job" 2>/dev/null && [ ! -f exit ] || exit 0
echo >canceled
{ read -r pid start boot; read -r pid start boot; } <pids
is_alive "$pid" "$start" "$boot" || exit 0
kill -TERM "$pid"
exec 9>&-
for i in $(seq 60); do [ ! -f exit ] || exit 0; sleep 0.25; done
"""
"""Ends the process group of the job, with TERM, and after 30 s with KILL; waits up to 15 s for the end."""

EXISTS = r"""
[ ! -f "$root/$job/pids" ] || echo yes
"""

REACH = r"""
exec 9>&-
for one in $others; do
  { said=$($ssh "$one" : </dev/null 2>&1) || echo "$one $(echo "$said" | tail -n 1)"; } &
done
wait
"""
"""Prints which of `others` this host does not reach with the command `ssh`, and why."""
